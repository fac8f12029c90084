"""An engine on virtual time: a whole trace at once, or request by request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from batchcore import _core, engine_options
from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.policy import SchedulingPolicy, check_user, encode_user
from batchcore.routing.policies import ReplicaLoad
from batchcore.simulation.result import Sample, SimResult
from batchcore.simulation.trace import Trace
from batchcore.stats import EngineStats

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Unpack

    from batchcore.simulation.device import SimDevice
    from batchcore.simulation.trace import SimRequest

__all__ = ["SimEngineOptions", "SimulatedEngine", "prompt_token_ids", "simulate"]

# Requests or steps per call into C++, which Ctrl-C has to wait for.
_CHUNK = 10_000


class SimEngineOptions(TypedDict, total=False):
    """Options of a simulated engine. They mean what those of `Engine` do, with its defaults."""

    max_num_seqs: int | Literal["auto"]
    n_ctx: int
    max_sequence_tokens: int | None
    n_ubatch: int
    kv_layout: Literal["auto", "unified", "streams"]
    prefix_caching: bool
    prefill_policy: Literal["latency", "balanced", "throughput"]
    target_itl_ms: float | None
    max_wait_ms: float
    policy: SchedulingPolicy | None
    preemption: Literal["auto", "recompute", "save"]
    max_saved_bytes: int
    host_cache_bytes: int
    max_queued_requests: int
    max_queued_tokens: int
    check_integrity: bool


class SimulatedEngine:
    """The real engine over a simulated device, driven by hand on a clock of its own.

    Several of them side by side, each run to the same time before a request is handed to one, are
    what a router has in front of it. Not faster with threads: one call at a time gets through.
    """

    def __init__(self, device: SimDevice, **options: Unpack[SimEngineOptions]) -> None:
        """Start at time 0, idle.

        Args:
            device: What steps take.
            options: Those of `Engine` that don't depend on a model; see `SimEngineOptions`.

        Raises:
            ConfigError: A value can't work.
        """
        self.device = device
        """What steps take."""
        self.policy = options.get("policy") or SchedulingPolicy()
        """Tiers, fair share and bounds per user."""
        self._native = _core.SimulatedEngine(
            device.to_dict(), *_native_options(options, self.policy)
        )
        self._requests: list[npt.NDArray[np.void]] = []
        self._users: dict[str, int] = {}
        self._samples: list[Sample] = []

    @property
    def now_s(self) -> float:
        """Virtual time. Steps are not cut short, so it may be beyond what was asked for."""
        return self._native.now

    def load(self) -> ReplicaLoad:
        """What it still has to do, as routing policies want to know it."""
        num_requests, num_tokens = self._native.load()
        return ReplicaLoad(num_tokens, num_requests)

    def submit(self, request: SimRequest) -> bool:
        """Run until the request's arrival, then submit it; False where the queue refused it.

        Raises:
            InvalidRequestError: It can't be served, or arrives before the time that was reached.
        """
        row = _row_of(request)
        row["user"] = self._number_of(request.user)
        taken = self._native.submit(row)
        self._requests.append(row)
        return taken

    def replay(self, trace: Trace, *, sample_interval_s: float | None = None) -> SimResult:
        """Submit every request of a trace when it arrives, and run until the last has ended.

        Args:
            trace: The requests.
            sample_interval_s: Keep the engine's counters this often, in virtual time.

        Raises:
            InvalidRequestError: A request can't be served, or arrives before the time that was
                reached.
            ConfigError: The interval is not above 0.
        """
        if sample_interval_s is not None and not sample_interval_s > 0:
            raise ConfigError(f"sample_interval_s must be above 0, not {sample_interval_s}")
        interval = sample_interval_s or math.inf
        numbers = np.array([self._number_of(user) for user in trace.users], np.int32)
        requests = trace.requests
        if (numbers != np.arange(numbers.size)).any():
            requests = requests.copy()
            requests["user"] = numbers[requests["user"]]
        before = self._native.num_outcomes
        self._native.reserve(len(trace))
        try:
            self._submit_all(requests, interval)
        finally:
            self._requests.append(requests[: self._native.num_outcomes - before])
        return self.result()

    def _submit_all(self, requests: npt.NDArray[np.void], interval: float) -> None:
        arrivals = requests["arrival_s"]
        next_s = self.now_s + interval
        begin = 0
        while begin < arrivals.size:
            end = min(begin + _CHUNK, int(np.searchsorted(arrivals, next_s, side="left")))
            self._native.replay(requests[begin:end])
            begin = end
            if begin < arrivals.size and arrivals[begin] >= next_s:
                next_s = self._sample(next_s) + interval
        while next_s < math.inf and self._native.load()[0] > 0:
            next_s = self._sample(next_s) + interval
        self.run_all()

    def run_until(self, time_s: float) -> None:
        """Step until the clock is there; idle time is skipped.

        Raises:
            InvalidRequestError: The time is not finite.
        """
        self._native.run_until(time_s)

    def run_all(self) -> None:
        """Step until every request has ended."""
        while not self._native.run_all(_CHUNK):
            pass

    def stats(self) -> EngineStats:
        """The engine's counters now. Its times by phase are virtual too."""
        return EngineStats.from_native(self._native.stats())

    def result(self) -> SimResult:
        """What became of all requests so far."""
        parts = self._requests or [np.empty(0, _core.sim_request_dtype())]
        requests = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._requests = [requests]
        trace = Trace(requests, tuple(self._users) or ("",))
        outcomes = self._native.outcomes()
        return SimResult(trace, self.device, outcomes, self.stats(), tuple(self._samples))

    def _sample(self, time_s: float) -> float:
        self.run_until(time_s)
        self._samples.append(Sample(time_s, self.stats()))
        return time_s

    def _number_of(self, user: str) -> int:
        if user not in self._users:
            check_user(user)
            self._users[user] = self._native.user(encode_user(user))
        return self._users[user]


def simulate(
    trace: Trace,
    device: SimDevice,
    *,
    sample_interval_s: float | None = None,
    **options: Unpack[SimEngineOptions],
) -> SimResult:
    """Replay a trace over a simulated engine, from an idle start until the last request has ended.

    A queue that is full refuses requests, which is an outcome. Ctrl-C ends it.

    Args:
        trace: The requests.
        device: What steps take.
        sample_interval_s: Keep the engine's counters this often, in virtual time.
        options: Those of `Engine` that don't depend on a model; see `SimEngineOptions`.

    Raises:
        ConfigError: A value can't work.
        InvalidRequestError: A request can't be served, such as a prompt that is too long.
    """
    return SimulatedEngine(device, **options).replay(trace, sample_interval_s=sample_interval_s)


def prompt_token_ids(request: SimRequest) -> list[int]:
    """The tokens that stand for a request's prompt, for policies that look at them.

    Two requests start with the same tokens only where they are of one prefix group, as far as both
    share it, or have the same key. The ids are beyond those of any model.

    Raises:
        InvalidRequestError: The request can't be served.
    """
    return _core.sim_prompt(_row_of(request))


def _row_of(request: SimRequest) -> npt.NDArray[np.void]:
    row = np.zeros(1, _core.sim_request_dtype())
    for name in row.dtype.names or ():
        if name == "user":
            continue
        try:
            row[name] = getattr(request, name)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"{name} of a request can't be used: {error}") from None
    return row


def _native_options(
    options: SimEngineOptions, policy: SchedulingPolicy
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the C++ engine takes: of its KV memory, and of its scheduler; checked as Engine does."""
    if unknown := options.keys() - SimEngineOptions.__annotations__.keys():
        raise ConfigError(f"a simulated engine has no option {min(unknown)!r}")
    max_num_seqs = options.get("max_num_seqs", 16)
    n_ctx = options.get("n_ctx", 8192)
    n_ubatch = options.get("n_ubatch", 512)
    prefix_caching = options.get("prefix_caching", True)
    target_itl_ms = options.get("target_itl_ms")
    max_wait_ms = options.get("max_wait_ms", 0.0)
    max_sequence_tokens = options.get("max_sequence_tokens")
    max_queued_requests = options.get("max_queued_requests", 10_000)
    max_queued_tokens = options.get("max_queued_tokens", 10_000_000)
    max_saved_bytes = options.get("max_saved_bytes", 1 << 30)
    host_cache_bytes = options.get("host_cache_bytes", 0)
    engine_options.check_positive(
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
    )
    engine_options.check_not_negative(
        max_saved_bytes=max_saved_bytes, host_cache_bytes=host_cache_bytes
    )
    if max_sequence_tokens is not None:
        engine_options.check_positive(max_sequence_tokens=max_sequence_tokens)
    if target_itl_ms is not None:
        engine_options.check_milliseconds("target_itl_ms", target_itl_ms, above_zero=True)
    engine_options.check_milliseconds("max_wait_ms", max_wait_ms, above_zero=False)
    num_seqs = engine_options.sequences_that_run(max_num_seqs, n_ctx)
    kv_layout = options.get("kv_layout", "auto")
    if kv_layout == "auto":
        kv_layout = "unified" if prefix_caching else "streams"
    context = {
        "kv_layout": kv_layout,
        "n_ctx": n_ctx,
        "n_ubatch": min(n_ubatch, n_ctx),
        "num_slots": engine_options.num_slots(
            num_seqs, kv_layout, prefix_caching, min(n_ubatch, n_ctx)
        ),
    }
    engine = {
        **policy.native_options(),
        "max_num_seqs": num_seqs,
        "adaptive": max_num_seqs == "auto",
        "max_wait_s": max_wait_ms / 1e3,
        "max_sequence_tokens": max_sequence_tokens or 0,
        "prefill_policy": options.get("prefill_policy", "balanced"),
        "target_itl_s": (target_itl_ms or 0.0) / 1e3,
        "prefix_caching": prefix_caching,
        "preemption": options.get("preemption", "auto"),
        "max_saved_bytes": max_saved_bytes,
        "host_cache_bytes": host_cache_bytes,
        "max_queued_requests": max_queued_requests,
        "max_queued_tokens": max_queued_tokens,
        "num_speculative_tokens": 0,
        "num_sampler_threads": 1,
        "check_integrity": options.get("check_integrity", False),
    }
    return context, engine
