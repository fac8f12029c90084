"""Several engines as one: which replica gets a request, and what happens when one fails."""

from __future__ import annotations

from batchcore.routing.policies import (
    LeastOutstanding,
    PrefixAware,
    ReplicaLoad,
    RoundRobin,
    RoutingPolicy,
)
from batchcore.routing.router import Router

__all__ = [
    "LeastOutstanding",
    "PrefixAware",
    "ReplicaLoad",
    "RoundRobin",
    "Router",
    "RoutingPolicy",
]
