"""Questions 11 and 12: what dynamic batching does for latency, and where static is as good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from batchcore.lab.answers_lengths import PADDING, say_arrangement, sorted_slot
from batchcore.lab.paths import MissingFigureError
from batchcore.lab.wording import digits, listed, percent, rate, ratio, seconds, span

if TYPE_CHECKING:
    from batchcore.lab.paths import Figures

__all__ = ["SAME", "Change", "change_of", "when_static", "why_dynamic"]

SAME = 1.03
"""A ratio of throughputs up to which two are called the same."""

DYNAMIC = "parts.dynamic"
_MODES = ("static", "continuous")
_FIGURES = {
    "throughput": "output_tokens_per_s",
    "mean_latency": "latency_s.mean",
    "p95_latency": "latency_s.p95",
}


@dataclass(frozen=True, slots=True)
class Change:
    """How many times the figure of static batches continuous batching has."""

    name: str
    middle: float
    """The median of the repeats."""
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Whether continuous batching is better in every repeat, in none, or in some."""
        if self.low <= 1 <= self.high:
            return "unclear"
        is_more = self.low > 1
        return "better" if is_more == (self.name == "throughput") else "worse"

    def __str__(self) -> str:
        """In words."""
        ends = span((ratio(self.low), ratio(self.high)))
        spread = "" if self.low == self.high else f" ({ends})"
        return f"{self.name.replace('_', ' ')} {ratio(self.middle)}{spread}"


def change_of(figures: Figures, name: str) -> Change:
    """A change, over pairs of runs; where there are none, of the median runs.

    Raises:
        MissingFigureError: There is neither.
    """
    path = f"{DYNAMIC}.improvement.{name}"
    if all(figures.peek(f"{path}.{end}") is not None for end in ("median", "low", "high")):
        return Change(name, *(figures.number(f"{path}.{end}") for end in ("median", "low", "high")))
    static, continuous = (figures.positive(f"{DYNAMIC}.{mode}.{_FIGURES[name]}") for mode in _MODES)
    return Change(name, *([continuous / static] * 3))


def why_dynamic(figures: Figures) -> tuple[str, str]:
    """Question 11."""
    changes = [change_of(figures, name) for name in ("mean_latency", "p95_latency")]
    verdicts = [change.verdict for change in changes]
    said = f"{listed([str(change) for change in changes])} of that of static batches"
    if verdicts == ["better"] * 2:
        answer = (
            "Because a request takes a slot as soon as another one ends, and does not wait for the "
            f"longest of a batch: {said}."
        )
    elif verdicts == ["worse"] * 2:
        answer = f"In this run it does not: {said}."
    elif "unclear" in verdicts:
        answer = f"This run does not show that it does, since its repeats don't agree: {said}."
    else:
        better, worse = ("mean", "p95") if verdicts[0] == "better" else ("p95", "mean")
        answer = f"In this run only the {better} latency is better, the {worse} is not: {said}."
    is_clear = verdicts == ["better"] * 2

    def idle(figures: Figures) -> str:
        waste = [figures.number(f"{DYNAMIC}.slot_waste.{mode}") for mode in _MODES]
        against = (
            ""
            if is_clear
            else "; against it stands that prompts which come in between delay those that run"
        )
        return (
            f"Idle slot steps were {percent(waste[0])} static and {percent(waste[1])} continuous: "
            f"a slot that is refilled serves those who wait{against}."
        )

    return answer, figures.sentences(idle, _runs, _first_tokens)


def _runs(figures: Figures) -> str:
    means, p95s = (
        [seconds(figures.number(f"{DYNAMIC}.{mode}.latency_s.{name}")) for mode in _MODES]
        for name in ("mean", "p95")
    )
    return (
        f"Median runs: mean latency {means[0]} static and {means[1]} continuous, p95 {p95s[0]} and "
        f"{p95s[1]}."
    )


def _first_tokens(figures: Figures) -> str:
    first = [seconds(figures.number(f"{DYNAMIC}.{mode}.ttft_s.mean")) for mode in _MODES]
    return f"The first token came after {first[0]} static and {first[1]} continuous on average."


def when_static(figures: Figures) -> tuple[str, str]:
    """Question 12."""
    gain = change_of(figures, "throughput")
    said = f"continuous batching has, of that of static batches, {gain}"
    if gain.verdict == "unclear":
        said += ", on which the repeats don't agree"
    if gain.middle <= SAME:
        answer = (
            f"For work like that of this run: {said}, so nothing is lost, and a batch that starts "
            "and ends as one is simpler."
        )
    else:
        answer = (
            "When all requests are there at once and their outputs are of one length, or of known "
            f"lengths to sort by. With requests as they came, {said}."
        )
    return answer, figures.sentences(_sorted_static, _uniform, _under_load)


def _sorted_static(figures: Figures) -> str:
    path = sorted_slot(figures)
    waste = figures.number(f"{path}.counted.waste")
    static = figures.number(f"{path}.output_tokens_per_s")
    continuous = figures.positive(f"{PADDING}.continuous.output_tokens_per_s")
    return (
        f"Known lengths: static batches {say_arrangement(figures, path)} idle in "
        f"{percent(waste)} of the slot steps and reach {rate(static, 'output tokens/s')}, "
        f"{percent(static / continuous)} of the {digits(continuous)} of continuous batching on the "
        "same requests."
    )


def _uniform(figures: Figures) -> str:
    gain = figures.number("parts.static.speedup.median")
    size = figures.number("parts.static.batch_size")
    return (
        f"One length: in part 2 one static batch of {size:.0f} equal outputs has no slot to refill "
        f"and is {ratio(gain)} as fast as one request at a time."
    )


def _under_load(figures: Figures) -> str:
    if not figures.length("parts.scheduler.loads"):
        raise MissingFigureError("parts.scheduler.loads")
    return (
        "Not for requests that arrive over time, as in part 6: one that comes while a batch runs "
        "waits for its end."
    )
