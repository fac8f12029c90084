"""In-process inference engine that batches many requests over llama.cpp."""

from __future__ import annotations

# First: it refuses to import on a CPU where loading _core would be an illegal instruction.
from batchcore import _cpu  # noqa: F401

# isort: split
from batchcore import errors
from batchcore._core import __version__
from batchcore.async_engine import AsyncEngine
from batchcore.engine import Engine
from batchcore.errors import BatchcoreError
from batchcore.handle import AsyncRequestHandle, FinishedRequest, RequestHandle
from batchcore.model import Model
from batchcore.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    RequestPadding,
    StreamDelta,
    TokenLogprobs,
)
from batchcore.params import SamplingParams
from batchcore.pinned import PinnedPrefix
from batchcore.policy import SchedulingPolicy, Tier
from batchcore.profile import Profile
from batchcore.routing.policies import (
    LeastOutstanding,
    PrefixAware,
    ReplicaLoad,
    RoundRobin,
    RoutingPolicy,
)
from batchcore.routing.prefix import PinnedPrefixes
from batchcore.routing.replica import ReplicaStatus
from batchcore.routing.routed_request import RouterHandle
from batchcore.routing.router import Router
from batchcore.routing.stats import ReplicaStats, RouterStats
from batchcore.stats import EngineStats, Histogram, LatencyStats, PaddingStats, TierStats
from batchcore.submission import Submission

__all__ = [
    "AsyncEngine",
    "AsyncRequestHandle",
    "BatchcoreError",
    "CompletionOutput",
    "Engine",
    "EngineStats",
    "FinishedRequest",
    "Histogram",
    "LatencyStats",
    "LeastOutstanding",
    "Model",
    "PaddingStats",
    "PinnedPrefix",
    "PinnedPrefixes",
    "PrefixAware",
    "Profile",
    "ReplicaLoad",
    "ReplicaStats",
    "ReplicaStatus",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "RequestPadding",
    "RoundRobin",
    "Router",
    "RouterHandle",
    "RouterStats",
    "RoutingPolicy",
    "SamplingParams",
    "SchedulingPolicy",
    "StreamDelta",
    "Submission",
    "Tier",
    "TierStats",
    "TokenLogprobs",
    "__version__",
    "errors",
]
