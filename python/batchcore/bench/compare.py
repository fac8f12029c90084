"""Which of two is faster, on a machine that is never quiet: paired runs and what they bear out.

Two measurements right after each other meet the same machine, others do not. So variants take turns
(`interleave`), and what is compared are the ratios within each round (`compare_pairs`).
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.bench.result import BenchmarkResult

__all__ = [
    "MetricComparison",
    "PairedRatio",
    "better_direction",
    "compare_pairs",
    "compare_results",
    "find_differences",
    "interleave",
    "interleaved_order",
]

T = TypeVar("T")

_NUM_RESAMPLES = 10_000
_MIN_PAIRS = 6
# What makes two results different measurements, whatever else differs.
_COMPARED_KEYS = {
    "environment": ("cpu", "num_usable_cores", "devices", "platform", "build"),
    "model": ("sha256", "file_name"),
}


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """How many times a baseline's value a candidate has, over pairs of measurements."""

    ratios: tuple[float, ...]
    """Candidate / baseline of each pair."""
    median: float
    low: float
    """The smallest of them."""
    high: float
    """The largest of them."""
    ci_low: float
    """Bootstrap interval of 95% for the median: lower end,"""
    ci_high: float
    """upper end."""

    @property
    def excludes_one(self) -> bool:
        """Whether the interval says that there is a difference; one pair alone can't."""
        return len(self.ratios) > 1 and not self.ci_low <= 1 <= self.ci_high

    @property
    def has_enough_pairs(self) -> bool:
        """Whether the interval can be of 95%.

        All of five pairs lie on the same side of the true median in 1 of 16 cases, of six in 1 of
        32. With fewer than six, read `excludes_one` as a hint.
        """
        return len(self.ratios) >= _MIN_PAIRS


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One figure of two results."""

    metric: str
    baseline: float | None
    """Of all runs together; None where it has none."""
    candidate: float | None
    ratio: PairedRatio | None
    """None where a run has no such figure, or one that is not above 0."""
    better: Literal["higher", "lower"] | None
    """Which way the metric is good; None where it is neither."""

    @property
    def verdict(self) -> Literal["better", "worse", "different", "unclear"]:
        """What the interval says about the candidate."""
        if self.ratio is None or not self.ratio.excludes_one:
            return "unclear"
        if self.better is None:
            return "different"
        return "better" if (self.ratio.median > 1) == (self.better == "higher") else "worse"


def compare_pairs(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> PairedRatio:
    """The median ratio of paired measurements, and how sure it is.

    The interval is the percentile bootstrap (Efron, 1979): the middle 95% of the medians of
    resampled pairs.

    Args:
        baseline: Measurements of the one,
        candidate: and of the other, in the same order.
        num_resamples: For the interval.
        seed: For the interval; the same gives the same.

    Raises:
        ConfigError: They are not pairs, or one is not a number above 0.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ConfigError(f"{len(baseline)} and {len(candidate)} measurements can't be paired")
    for value in (*baseline, *candidate):
        if not 0 < value < math.inf:
            raise ConfigError(f"can't take a ratio of {value}; it must be above 0 and finite")
    if num_resamples < 1:
        raise ConfigError(f"num_resamples must be at least 1, not {num_resamples}")
    import numpy as np  # noqa: PLC0415 - only needed here, and importing it takes long

    ratios = [two / one for one, two in zip(baseline, candidate, strict=True)]
    picks = np.random.default_rng(seed).integers(len(ratios), size=(num_resamples, len(ratios)))
    medians = np.median(np.asarray(ratios)[picks], axis=1)
    ci_low, ci_high = (float(end) for end in np.percentile(medians, (2.5, 97.5)))
    return PairedRatio(
        tuple(ratios), statistics.median(ratios), min(ratios), max(ratios), ci_low, ci_high
    )


def interleaved_order(num_variants: int, rounds: int, *, seed: int = 0) -> list[list[int]]:
    """In which order the variants run in each round.

    Every other round is the one before it backwards (A B B A), so that a machine that grows slower
    or faster over time favours none. Which order a pair of rounds starts with, is drawn.

    Raises:
        ConfigError: A count is below 1.
    """
    if num_variants < 1 or rounds < 1:
        raise ConfigError(f"can't run {num_variants} variants in {rounds} rounds")
    rng = random.Random(seed)
    orders: list[list[int]] = []
    for index in range(rounds):
        if index % 2:
            orders.append(orders[-1][::-1])
        else:
            orders.append(rng.sample(range(num_variants), num_variants))
    return orders


def interleave(
    callables: Sequence[Callable[[], T]], rounds: int, *, seed: int = 0
) -> list[list[T]]:
    """Call every variant once per round, in the order of `interleaved_order`.

    Returns what each of them gave, round by round: two of those lists are pairs.

    Raises:
        ConfigError: There is nothing to call.
    """
    results: list[list[T]] = [[] for _ in callables]
    for order in interleaved_order(len(callables), rounds, seed=seed):
        for index in order:
            results[index].append(callables[index]())
    return results


def compare_results(
    baseline: BenchmarkResult, candidate: BenchmarkResult
) -> list[MetricComparison]:
    """Compare every figure that both have, run by run.

    The runs are taken as pairs. They are only good ones where the two were measured in turns.

    Raises:
        ConfigError: They are of different kinds, or have not the same number of runs.
    """
    if baseline.kind != candidate.kind:
        raise ConfigError(f"can't compare {baseline.kind!r} with {candidate.kind!r}")
    if len(baseline.runs) != len(candidate.runs):
        raise ConfigError(
            f"{len(baseline.runs)} runs and {len(candidate.runs)} runs can't be paired"
        )
    rows = []
    for metric in baseline.metrics:
        if metric not in candidate.metrics:
            continue
        one, two = (
            [run.metrics.get(metric) or 0.0 for run in result.runs]
            for result in (baseline, candidate)
        )
        has_ratio = bool(one) and all(0 < value < math.inf for value in (*one, *two))
        rows.append(
            MetricComparison(
                metric,
                baseline.metrics[metric],
                candidate.metrics[metric],
                compare_pairs(one, two) if has_ratio else None,
                better_direction(metric),
            )
        )
    return rows


def better_direction(metric: str) -> Literal["higher", "lower"] | None:
    """Whether more of a metric is good, by the unit in its name; None for counts and the like."""
    if metric.endswith("_per_s"):
        return "higher"
    return "lower" if metric.endswith(("_s", "_ms", "_bytes")) else None


def find_differences(
    baseline: BenchmarkResult, candidate: BenchmarkResult
) -> dict[str, tuple[Any, Any]]:
    """What else than the figures differs: machine, build, model and options, both values by name.

    An option under comparison should be the only one.
    """
    pairs = {
        f"{part}.{key}": (getattr(baseline, part).get(key), getattr(candidate, part).get(key))
        for part, keys in _COMPARED_KEYS.items()
        for key in keys
    }
    for key in dict.fromkeys((*baseline.config, *candidate.config)):
        pairs[f"config.{key}"] = (baseline.config.get(key), candidate.config.get(key))
    return {name: (one, two) for name, (one, two) in pairs.items() if one != two}
