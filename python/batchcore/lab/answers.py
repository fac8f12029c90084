"""Answers to the twelve questions of the lab, each from the figures of one document.

Every number in an answer or its reasoning is one of the document, named in `figures` by its path,
or made of such by the arithmetic that the sentence says. What a run can't answer stays open, and
says what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab import (
    answers_bound,
    answers_dynamic,
    answers_lengths,
    answers_sizes,
    answers_speed,
)
from batchcore.lab.paths import Figures, MissingFigureError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    # Gives the answer and the reasoning; MissingFigureError says that there is none.
    Maker = Callable[[Figures], tuple[str, str]]

__all__ = ["PART_TITLES", "build_answers", "say_what_is_missing"]

PART_TITLES = {
    "sequential": "Part 1: One request at a time",
    "static": "Part 2: Static batching",
    "batch_sizes": "Part 3: Batch sizes",
    "padding": "Part 4: Variable lengths",
    "dynamic": "Part 5: Static against dynamic batching",
    "scheduler": "Part 6: Under load",
}

_QUESTIONS: tuple[tuple[str, Maker], ...] = (
    ("What is the total time of the sequential requests?", answers_speed.total_time),
    ("What is the throughput (tokens over time)?", answers_speed.throughput),
    ("What speed-up does batching bring?", answers_speed.speedup),
    ("Why isn't the speed-up as large as the number of sequences?", answers_speed.why_not_ideal),
    ("Is the GPU, or here the CPU, compute-bound or memory-bound?", answers_bound.what_bounds),
    ("What is the optimal batch size for this machine?", answers_sizes.optimal_size),
    ("Does throughput scale linearly with batch size?", answers_sizes.is_linear),
    ("What limits the maximum batch size?", answers_sizes.what_limits),
    ("What percentage of compute is wasted by padding?", answers_lengths.padding_waste),
    ("How much does bucketing reduce it?", answers_lengths.bucketing_gain),
    ("Why does dynamic batching have better latency?", answers_dynamic.why_dynamic),
    ("When would static batching be preferable to dynamic?", answers_dynamic.when_static),
)


def build_answers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answer every question; the result is what a document has under `answers`."""
    return [
        {"number": number, "question": question, **_answer(document, maker)}
        for number, (question, maker) in enumerate(_QUESTIONS, 1)
    ]


def say_what_is_missing(document: Mapping[str, Any], path: str) -> str:
    """Why a document has nothing at a path, in a sentence."""
    names = path.replace("[", ".").split(".")
    because = " (it was interrupted)" if document.get("interrupted") else ""
    if names[0] == "parts" and len(names) > 1 and not resolve(document, f"parts.{names[1]}"):
        title = PART_TITLES.get(names[1], names[1])
        return f"{title} is not part of this run{because}."
    verdict = str(resolve(document, "roofline.verdict"))
    if names[0] == "roofline" and verdict.startswith("not known"):
        return f"The roofline is {verdict.rstrip('.')}."
    if not resolve(document, names[0]):
        return f"This run has no {names[0]} figures{because}."
    return f"This run has no figure `{path}`{because}."


def _answer(document: Mapping[str, Any], maker: Maker) -> dict[str, Any]:
    figures = Figures(document)
    try:
        answer, reasoning = maker(figures)
    except MissingFigureError as missing:
        return {
            "answer": f"Not answered. {say_what_is_missing(document, missing.path)}",
            "figures": {},
            "reasoning": "",
            "answered": False,
        }
    return {"answer": answer, "figures": figures.used, "reasoning": reasoning, "answered": True}
