"""What became of the requests of a simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from batchcore.bench.metrics import Slo
    from batchcore.simulation.device import SimDevice
    from batchcore.simulation.trace import Trace
    from batchcore.stats import EngineStats

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int32]
    Mask = npt.NDArray[np.bool_]

__all__ = ["ENDS", "Sample", "SimResult", "jain_index"]

ENDS = ("stop", "length", "cancelled", "timeout", "error", "refused", "open")
"""How a request can have ended, by the number in `SimResult.end`."""
_LENGTH, _TIMEOUT, _REFUSED = (ENDS.index(end) for end in ("length", "timeout", "refused"))


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine's counters at a time of the simulation."""

    time_s: float
    stats: EngineStats


@dataclass(frozen=True, slots=True, eq=False)
class SimResult:
    """A simulation: one value per request in every array, in the order of the trace.

    Times are in seconds of virtual time, NaN where not reached. Latencies count from the arrival.
    """

    trace: Trace
    device: SimDevice
    outcomes: npt.NDArray[np.void]
    """One record per request; the properties below are its columns."""
    stats: EngineStats
    """The engine's counters at the end, with histograms of the gaps between tokens."""
    samples: tuple[Sample, ...] = ()
    """At the interval that was asked for."""

    is_simulated = True
    """That nothing here was measured on a device."""

    @property
    def admitted_s(self) -> Floats:
        """When it got its first slot."""
        return self.outcomes["admitted_s"]

    @property
    def first_token_s(self) -> Floats:
        """When it had its first token."""
        return self.outcomes["first_token_s"]

    @property
    def finished_s(self) -> Floats:
        """When it ended, however that was."""
        return self.outcomes["finished_s"]

    @property
    def num_output_tokens(self) -> Integers:
        """Generated, also by those that did not get to their end."""
        return self.outcomes["num_output_tokens"]

    @property
    def num_cached_tokens(self) -> Integers:
        """Prompt tokens that a cached prefix saved."""
        return self.outcomes["num_cached_tokens"]

    @property
    def num_preemptions(self) -> Integers:
        """How often it had to give way."""
        return self.outcomes["num_preemptions"]

    @property
    def end(self) -> Integers:
        """How it ended, as an index into `ENDS`."""
        return self.outcomes["end"]

    @property
    def is_completed(self) -> Mask:
        """It has all its tokens."""
        return _where(self.end == _LENGTH)

    @property
    def is_refused(self) -> Mask:
        """The queue did not take it: at its bound, or because it would have come too late."""
        return _where(self.end == _REFUSED)

    @property
    def is_timed_out(self) -> Mask:
        """A timeout of its own passed."""
        return _where(self.end == _TIMEOUT)

    @property
    def queue_s(self) -> Floats:
        """Until its first slot."""
        return self.admitted_s - self.trace.arrival_s

    @property
    def ttft_s(self) -> Floats:
        """Until its first token."""
        return self.first_token_s - self.trace.arrival_s

    @property
    def latency_s(self) -> Floats:
        """Until its end."""
        return self.finished_s - self.trace.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Mean gap between its tokens; NaN with fewer than two."""
        gaps = np.where(self.num_output_tokens > 1, self.num_output_tokens - 1, np.nan)
        return (self.finished_s - self.first_token_s) / gaps

    @property
    def total_s(self) -> float:
        """From the start until the last request ended."""
        ended = self.finished_s[~np.isnan(self.finished_s)]
        return float(ended.max()) if ended.size else 0.0

    def of_user(self, user: str) -> Mask:
        """Which requests are of this user.

        Raises:
            ConfigError: The trace has no such user.
        """
        if user not in self.trace.users:
            raise ConfigError(f"the trace has no user {user!r}")
        return _where(self.trace.user == self.trace.users.index(user))

    def percentile(self, values: Floats, percent: float, where: Mask | None = None) -> float:
        """Of the values that are not NaN, of the requests `where`; NaN where there are none.

        For example `result.percentile(result.ttft_s, 95, result.of_user("anna"))`.
        """
        chosen = values if where is None else values[where]
        chosen = chosen[~np.isnan(chosen)]
        return float(np.percentile(chosen, percent)) if chosen.size else math.nan

    def is_good(self, slo: Slo) -> Mask:
        """Which requests were completed and within every bound.

        Raises:
            ConfigError: The SLO bounds single gaps, which a simulation does not keep.
        """
        if slo.itl_ms is not None:
            raise ConfigError("single gaps are not kept: bound their mean, tpot_ms")
        good = self.is_completed
        for bound_ms, value_s in (
            (slo.ttft_ms, self.ttft_s),
            (slo.tpot_ms, np.nan_to_num(self.tpot_s)),
            (slo.e2el_ms, self.latency_s),
        ):
            if bound_ms is not None:
                good = _where(good & (value_s * 1e3 <= bound_ms))
        return good

    def goodput(self, slo: Slo, where: Mask | None = None) -> float:
        """Good requests per second of the trace, of those `where`.

        Over the time in which requests came, so that how long the queue takes to empty afterwards
        changes nothing.
        """
        good = self.is_good(slo) if where is None else self.is_good(slo) & where
        return float(good.sum()) / self.trace.duration_s if self.trace.duration_s else 0.0

    def service(
        self,
        times_s: npt.ArrayLike,
        *,
        prompt_token_cost: float = 1.0,
        output_token_cost: float = 2.0,
    ) -> Floats:
        """What each user has been given by each time: one row per user, in cost units.

        As the engine's fair share counts it: a prompt's tokens when it is admitted, those of a
        cached prefix free; output tokens as they come. Those of a request are taken to come evenly
        between its first and its last.
        """
        times = np.asarray(times_s, np.float64)
        prompts = prompt_token_cost * (self.trace.num_prompt_tokens - self.num_cached_tokens)
        output, first, last = self.num_output_tokens, self.first_token_s, self.finished_s
        span = last - first
        # All at once where there is no span to spread them over.
        slope = np.divide(
            output_token_cost * (output - 1), span, out=np.zeros_like(span), where=span > 0
        )
        jump = output_token_cost * np.where(slope > 0, 1, output)
        found = np.zeros((len(self.trace.users), times.size))
        for user in range(len(self.trace.users)):
            mine = self.trace.user == user
            admitted = mine & ~np.isnan(self.admitted_s)
            started = mine & (output > 0)
            found[user] = (
                _steps(times, self.admitted_s[admitted], prompts[admitted])
                + _steps(times, first[started], jump[started])
                + _ramps(times, first[started], slope[started])
                - _ramps(times, last[started], slope[started])
            )
        return found

    def jain_index(
        self,
        begin_s: float,
        end_s: float,
        *,
        weights: Mapping[str, float] | None = None,
        users: Sequence[str] | None = None,
    ) -> float:
        """How evenly service was spread over users from one time to another; see `jain_index`.

        Args:
            begin_s: Start of the time that counts.
            end_s: Its end.
            weights: By which a user's service is divided; 1 for those not in it.
            users: Whose; None means all.
        """
        service = np.diff(self.service([begin_s, end_s]), axis=1)[:, 0]
        chosen = self.trace.users if users is None else users
        return jain_index(
            [
                service[self.trace.users.index(user)] / (weights or {}).get(user, 1.0)
                for user in chosen
            ]
        )

    def summary(self) -> dict[str, Any]:
        """The usual figures, ready for JSON. All of them are simulated."""
        ends, counts = np.unique(self.end, return_counts=True)
        duration = self.trace.duration_s
        quantiles = {
            f"p{percent}_{name}_s": self.percentile(getattr(self, f"{name}_s"), percent)
            for name in ("queue", "ttft", "tpot", "latency")
            for percent in (50, 95, 99)
        }
        itl = self.stats.latencies.itl
        return {
            "simulated": True,
            "num_requests": len(self.trace),
            "trace_s": duration,
            "total_s": self.total_s,
            "ends": {ENDS[end]: int(count) for end, count in zip(ends, counts, strict=True)},
            "num_output_tokens": int(self.num_output_tokens.sum()),
            "output_tokens_per_s": float(self.num_output_tokens.sum()) / (self.total_s or math.nan),
            "num_preemptions": int(self.num_preemptions.sum()),
            **quantiles,
            **{f"p{percent}_itl_s": itl.quantile(percent / 100) for percent in (50, 95, 99)},
        }


def jain_index(values: npt.ArrayLike) -> float:
    """Jain's fairness index (DEC-TR-301, 1984): 1 where all are equal, 1 / n where one has all.

    NaN where there are none, or all of them are 0.
    """
    given = np.asarray(values, np.float64)
    squares = float((given**2).sum()) * given.size
    return float(given.sum()) ** 2 / squares if squares > 0 else math.nan


def _where(mask: npt.NDArray[Any]) -> Mask:
    return mask


def _steps(times: Floats, at: Floats, heights: npt.NDArray[Any]) -> Floats:
    """Sum of the heights whose time has come, at each of `times`."""
    order = np.argsort(at)
    sums = np.concatenate(([0.0], np.cumsum(heights[order])))
    return sums[np.searchsorted(at[order], times, side="right")]


def _ramps(times: Floats, at: Floats, slopes: Floats) -> Floats:
    """Sum of slope * (time - at) over those whose time has come."""
    return times * _steps(times, at, slopes) - _steps(times, at, slopes * at)
