"""From the times of requests to the figures that people compare: TTFT, ITL, TPOT, throughput.

Needs no engine: whoever has the times of some requests, of any server, can have them summed up.
Figures of a summary have the names and units of other tools, e.g. `p99_ttft_ms`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from batchcore.bench.runners import percentile
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Quantiles", "RequestRecord", "Slo", "Summary", "summarize"]

_COMPLETED = ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What one request of a run was given, and when.

    `ttft_s` and `latency_s` count from `due_s`, not from the submit: a driver that is late must not
    make an engine look faster than its users would find it.
    """

    index: int
    """Of the request in its workload."""
    arrival_s: float = 0.0
    """From the start of the run until it arrived."""
    due_s: float = 0.0
    """Until it could be submitted: `arrival_s`, or later where `max_concurrency` held it back."""
    submitted_s: float | None = None
    """Until it was submitted."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed because a cached prefix had them."""
    completion_tokens: tuple[int, ...] = ()
    """Tokens that were produced, of each completion."""
    ttft_s: float | None = None
    """Until its first token; None where it produced none."""
    itl_s: tuple[float, ...] = ()
    """Gaps between one token and the next of the same completion; 0 where both came together."""
    latency_s: float | None = None
    """Until the last of it; None where it was refused or cut off."""
    finish_reason: str | None = None
    """None where it was refused or failed."""
    error: str | None = None
    """The type of the error that refused or ended it."""
    error_message: str | None = None
    user: str | None = None
    group: str | None = None

    @property
    def lag_s(self) -> float | None:
        """By how much the driver was late."""
        return None if self.submitted_s is None else self.submitted_s - self.due_s

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were produced, of all its completions."""
        return sum(self.completion_tokens)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token behind the first (of the longest completion)."""
        longest = max(self.completion_tokens, default=0)
        if longest < 2 or self.ttft_s is None or self.latency_s is None:
            return None
        return (self.latency_s - self.ttft_s) / (longest - 1)

    @property
    def is_completed(self) -> bool:
        """Whether it came to its own end, not to that of a timeout, a cancel or an error."""
        return self.error is None and self.finish_reason in _COMPLETED

    def to_dict(self) -> dict[str, Any]:
        """All fields and `tpot_s`, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "tpot_s": self.tpot_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet to count for the goodput; None means it need not."""

    ttft_ms: float | None = None
    """Time to the first token."""
    itl_ms: float | None = None
    """Every single gap between its tokens."""
    tpot_ms: float | None = None
    """The mean gap."""
    e2el_ms: float | None = None
    """Latency of the whole request."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is not above 0.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                name = field.name.removesuffix("_ms")
                raise ConfigError(f"{name} must be a number of ms above 0, not {value}")

    @classmethod
    def parse(cls, text: str | Iterable[str]) -> Slo:
        """Read `ttft:200 itl:50`, in one text or several; the numbers are milliseconds.

        Raises:
            ConfigError: A part is not of that form, unknown or there twice, or there is none.
        """
        known = [field.name.removesuffix("_ms") for field in fields(cls)]
        parts = re.split(r"[\s,]+", text if isinstance(text, str) else " ".join(text))
        values: dict[str, float] = {}
        for part in filter(None, parts):
            name, _, number = part.partition(":")
            if name not in known:
                raise ConfigError(f"unknown SLO {part!r}; known: {', '.join(known)}")
            if f"{name}_ms" in values:
                raise ConfigError(f"the SLO {name} is given twice")
            try:
                values[f"{name}_ms"] = float(number)
            except ValueError:
                raise ConfigError(f"{part!r} is not of the form {name}:MILLISECONDS") from None
        if not values:
            raise ConfigError("no SLO given; one looks like ttft:200")
        return cls(**values)

    def is_met(self, record: RequestRecord) -> bool:
        """Whether a request was completed and within every bound.

        One token alone has no gaps, and so meets any bound on them.
        """
        if not record.is_completed or record.ttft_s is None or record.latency_s is None:
            return False
        pairs = (
            (self.ttft_ms, record.ttft_s),
            (self.itl_ms, max(record.itl_s, default=0.0)),
            (self.tpot_ms, record.tpot_s or 0.0),
            (self.e2el_ms, record.latency_s),
        )
        return all(bound_ms is None or value_s * 1e3 <= bound_ms for bound_ms, value_s in pairs)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of some times in seconds; all NaN where there are none."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Quantiles:
        """Of the values that are not None."""
        ordered = sorted(value for value in values if value is not None)
        mean = math.fsum(ordered) / len(ordered) if ordered else math.nan
        return cls(mean, *(percentile(ordered, percent) for percent in (50, 95, 99)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a run. Times are those of completed requests; tokens are all that were produced.

    Rates are over the time of the whole run, from its start until its last request ended.
    """

    num_requests: int
    """Asked for."""
    num_completed: int
    """Came to their own end."""
    num_failed: int
    """Were refused, failed, timed out or were cut off."""
    errors: dict[str, int]
    """How many failed with which error, or ended for which other reason."""
    total_s: float
    num_prompt_tokens: int
    """Of requests that produced a token."""
    num_cached_tokens: int
    """Those of them that were not computed."""
    num_output_tokens: int
    num_good: int | None
    """Requests that met every SLO; None where there was none to meet."""
    ttft_s: Quantiles
    tpot_s: Quantiles
    itl_s: Quantiles
    """Over the gaps of all requests."""
    e2el_s: Quantiles
    lag_s: Quantiles
    """How late the driver was, for all requests; large values make a run worthless."""

    @property
    def requests_per_s(self) -> float:
        """Completed ones."""
        return self._rate(self.num_completed)

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens that were produced."""
        return self._rate(self.num_output_tokens)

    @property
    def total_tokens_per_s(self) -> float:
        """Tokens of prompts, cached ones too, and tokens that were produced."""
        return self._rate(self.num_prompt_tokens + self.num_output_tokens)

    @property
    def goodput_requests_per_s(self) -> float | None:
        """Requests that met every SLO."""
        return None if self.num_good is None else self._rate(self.num_good)

    def _rate(self, count: int) -> float:
        return count / self.total_s if self.total_s > 0 else 0.0

    def to_metrics(self) -> dict[str, float | None]:
        """Every figure under a name with its unit, e.g. `p99_ttft_ms`; None where there is none."""
        found: dict[str, float | None] = {
            "num_requests": self.num_requests,
            "num_completed": self.num_completed,
            "num_failed": self.num_failed,
            "total_s": self.total_s,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "goodput_requests_per_s": self.goodput_requests_per_s,
        }
        for name in ("ttft", "tpot", "itl", "e2el", "lag"):
            quantiles = getattr(self, f"{name}_s")
            for field in fields(Quantiles):
                value_s = getattr(quantiles, field.name)
                value_ms = None if math.isnan(value_s) else value_s * 1e3
                found[f"{field.name}_{name}_ms"] = value_ms
        return found


def summarize(
    records: Sequence[RequestRecord],
    total_s: float,
    *,
    num_requests: int | None = None,
    slo: Slo | None = None,
) -> Summary:
    """Sum up a run.

    Args:
        records: Of its requests.
        total_s: From its start until its last request ended.
        num_requests: Asked for, where some have no record; those count as neither completed nor
            failed.
        slo: What the goodput is to count; None means no goodput.
    """
    completed = [record for record in records if record.is_completed]
    started = [record for record in records if record.ttft_s is not None]
    failed = (record for record in records if not record.is_completed)
    return Summary(
        num_requests=len(records) if num_requests is None else num_requests,
        num_completed=len(completed),
        num_failed=len(records) - len(completed),
        errors=dict(Counter(record.error or record.finish_reason or "none" for record in failed)),
        total_s=total_s,
        num_prompt_tokens=sum(record.num_prompt_tokens for record in started),
        num_cached_tokens=sum(record.num_cached_tokens for record in started),
        num_output_tokens=sum(record.num_output_tokens for record in records),
        num_good=None if slo is None else sum(slo.is_met(record) for record in completed),
        ttft_s=Quantiles.of(record.ttft_s for record in completed),
        tpot_s=Quantiles.of(record.tpot_s for record in completed),
        itl_s=Quantiles.of(gap for record in completed for gap in record.itl_s),
        e2el_s=Quantiles.of(record.latency_s for record in completed),
        lag_s=Quantiles.of(record.lag_s for record in records),
    )
