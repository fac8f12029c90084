"""Questions 9 and 10: what differing lengths cost, and what bucketing does about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchcore.lab.paths import MissingFigureError, is_number
from batchcore.lab.wording import count, percent, points

if TYPE_CHECKING:
    from batchcore.lab.paths import Figures

__all__ = [
    "PADDING",
    "SLOT",
    "STRATEGIES",
    "best_strategy",
    "bucketing_gain",
    "padding_waste",
    "say_arrangement",
    "sorted_slot",
]

PADDING = "parts.padding"
STRATEGIES = f"{PADDING}.prompt_strategies"
SLOT = f"{PADDING}.slot"

_LITTLE = 0.8  # of the idle steps: what is left where a way of sorting is called of little use


def padding_waste(figures: Figures) -> tuple[str, str]:
    """Question 9."""
    waste_pct = figures.number(f"{PADDING}.lab_formula_waste_pct")
    max_tokens = figures.number(f"{PADDING}.max_tokens")
    lengths = figures.numbers(f"{PADDING}.lengths")

    def counted(figures: Figures) -> str:
        slot = figures.find(SLOT, "strategy", "none")
        waste = figures.number(f"{slot}.counted.waste")
        return (
            f"Counted in static batches in order of arrival, {percent(waste)} of the slot steps "
            "were idle."
        )

    def batches(figures: Figures) -> str | None:
        none = figures.find(STRATEGIES, "strategy", "none")
        batches = figures.number(f"{none}.num_batches")
        if batches < 2:
            return None  # that is what the formula has
        wasted, padded = (figures.number(f"{none}.{name}_tokens") for name in ("wasted", "padded"))
        return (
            f"Cut into {batches:.0f} batches in order of arrival, {wasted:,.0f} of {padded:,.0f} "
            f"tokens are padding, {points(figures.number(f'{none}.waste_pct'))}%."
        )

    def engine(figures: Figures) -> str:
        attention, shape = (
            figures.number(f"{PADDING}.continuous.{name}_waste") for name in ("attention", "shape")
        )
        return (
            "The engine itself packs prompts without padding; continuous batching went over "
            f"{percent(attention)} of the key positions in vain (ggml skips most of them "
            f"quickly), and {percent(shape)} of its rows were fillers."
        )

    answer = (
        f"{points(waste_pct)}% by the lab's formula, all prompts as one batch of rows as long as "
        f"the longest and {max_tokens:.0f} generated tokens each. {figures.sentences(counted)}"
    )
    shortest = f"The {len(lengths)} prompts have {min(lengths)} to {max(lengths)} tokens."
    return answer.strip(), f"{shortest} {figures.sentences(batches, engine)}".strip()


def best_strategy(figures: Figures) -> tuple[str, str]:
    """Paths of the strategy `none` and of the one with the least padding, which may be the same.

    Raises:
        MissingFigureError: One of them is not there.
    """
    none = figures.find(STRATEGIES, "strategy", "none")
    paths = [f"{STRATEGIES}[{index}]" for index in range(figures.length(STRATEGIES))]
    there = [path for path in paths if is_number(figures.peek(f"{path}.waste_pct"))]
    if len(there) < 2:
        raise MissingFigureError(STRATEGIES)
    return none, min(there, key=lambda path: figures.peek(f"{path}.waste_pct"))


def sorted_slot(figures: Figures) -> str:
    """Path of the arrangement of static batches that idled least, other than `none`.

    Raises:
        MissingFigureError: There is none.
    """
    others = [path for path in _slots(figures) if figures.peek(f"{path}.strategy") != "none"]
    if not others:
        raise MissingFigureError(SLOT)
    return min(others, key=lambda path: figures.peek(f"{path}.counted.waste"))


def bucketing_gain(figures: Figures) -> tuple[str, str]:
    """Question 10."""
    none, best = best_strategy(figures)
    before = figures.number(f"{none}.waste_pct")

    def agreement(figures: Figures) -> str:
        agree = [figures.need(f"{SLOT}[{index}].agree") for index in range(figures.length(SLOT))]
        if not agree:
            raise MissingFigureError(SLOT)
        return (
            "What the engine counted is what the formula gives."
            if all(agree)
            else "What the engine counted is not what the formula gives in every case."
        )

    reasoning = figures.sentences(_idle_by_strategy, _prompts_or_outputs, agreement)
    if best == none:
        return (
            f"Not at all: {points(before)}% without any is the least of all strategies.",
            reasoning,
        )
    name, after = figures.text(f"{best}.strategy"), figures.number(f"{best}.waste_pct")
    saved = figures.number(f"{best}.saved_pct_points")
    less = f", {percent(saved / before)} of it" if before > 0 else ""
    batches = count(figures.number(f"{best}.num_batches"), "rectangle")
    answer = (
        f"By {points(saved)} percentage points{less}: `{name}` takes prompt padding from "
        f"{points(before)}% to {points(after)}%, in {batches}."
    )
    return answer, reasoning


def _idle_by_strategy(figures: Figures) -> str:
    parts = []
    for path in _slots(figures):
        waste = figures.number(f"{path}.counted.waste")
        parts.append(f"{percent(waste)} {say_arrangement(figures, path)}")
    if not parts:
        raise MissingFigureError(SLOT)
    return f"Idle slot steps in the static batches that were run: {', '.join(parts)}."


def _prompts_or_outputs(figures: Figures) -> str | None:
    none = figures.number(f"{figures.find(SLOT, 'strategy', 'none')}.counted.waste")
    by_prompt = [
        path
        for path in _slots(figures)
        if str(figures.peek(f"{path}.grouped_by")).startswith("prompt")
    ]
    if not by_prompt:
        return None
    least = min(figures.number(f"{path}.counted.waste") for path in by_prompt)
    if least < _LITTLE * none:
        return None
    return "Buckets of prompts do little for slots, which wait for outputs and not for prompts."


def _slots(figures: Figures) -> list[str]:
    """Paths of the static batches that were counted."""
    paths = [f"{SLOT}[{index}]" for index in range(figures.length(SLOT))]
    return [path for path in paths if is_number(figures.peek(f"{path}.counted.waste"))]


def say_arrangement(figures: Figures, path: str) -> str:
    """How static batches were put together, in words."""
    name = figures.text(f"{path}.strategy")
    if name == "none":
        return "in order of arrival"
    by = str(figures.peek(f"{path}.grouped_by") or "")
    if not by or by.split(maxsplit=1)[0] in name:
        return name
    return f"{name} (by {figures.text(f'{path}.grouped_by')})"
