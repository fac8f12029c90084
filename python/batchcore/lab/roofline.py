"""What bounds a step of this model on this machine: the roofline, at every batch size."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.bench.peaks import measure_peaks
from batchcore.bench.roofline import Roofline
from batchcore.errors import BatchcoreError
from batchcore.lab.setup import greedy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchcore.bench.peaks import Peaks
    from batchcore.bench.roofline import RooflinePoint
    from batchcore.lab.setup import Lab

__all__ = ["measure_roofline"]

_SKIPPED_STEPS = 2  # the first decode steps of an engine allocate
_PROMPT_TOKENS = 8  # few enough for all prompts to be computed in the first call
_NO_FIGURES: dict[str, Any] = {"peaks": None, "model_cost": None, "points": []}


def measure_roofline(lab: Lab, done: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the peaks, steps of decode at the sizes of part 3, and a prefill; classify them."""
    if any(device["type"] in {"gpu", "igpu"} for device in _core.devices()):
        why = "not known: the peaks of a GPU are not measured by this version"
        return {"roofline": {**_NO_FIGURES, "verdict": why}}
    if lab.cost is None:
        return {"roofline": {**_NO_FIGURES, "verdict": f"not known: {lab.why_no_cost}"}}
    c = lab.config
    sizes = [row["batch_size"] for row in done["batch_sizes"]["rows"] if row["fits"]]
    lab.on_step(0.0, "peaks of the machine")
    try:
        peaks = measure_peaks(c.n_threads)
    except BatchcoreError as error:
        why = f"not known: {error}"
        found = {**_NO_FIGURES, "model_cost": lab.cost.to_dict(), "verdict": why}
        return {"roofline": found}
    lab.on_step(0.2, "prefill")
    rows, prefill_s = _prefill(lab)
    peaks = _better_peaks(lab, peaks, rows, prefill_s)
    line = Roofline(lab.cost, peaks)
    points = []
    for index, size in enumerate(sizes):
        lab.on_step(0.3 + 0.7 * index / len(sizes), f"decode of {size}")
        step_s = _decode_step_s(lab, size)
        if step_s is not None:
            context = _PROMPT_TOKENS + c.short_max_tokens / 2
            points.append(line.classify(size, step_s, context_tokens=context))
    prefill = line.classify(rows, prefill_s, context_tokens=rows / 2, outputs=1, sequences=1)
    labelled = [
        *({**point.to_dict(), "label": _decode_label(point.rows)} for point in points),
        {**prefill.to_dict(), "label": f"prefill, {rows} rows"},
    ]
    return {
        "roofline": {
            "peaks": peaks.to_dict(),
            "model_cost": lab.cost.to_dict(),
            "points": labelled,
            "verdict": say_verdict(points, prefill),
        }
    }


def say_verdict(decode: list[RooflinePoint], prefill: RooflinePoint) -> str:
    """All points in a sentence."""
    parts = []
    for verdict, group in groupby(decode, key=lambda point: point.verdict):
        rows = [point.rows for point in group]
        span = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else str(rows[0])
        parts.append(f"decode with {span} rows is {verdict}")
    parts.append(f"a prefill of {prefill.rows} tokens is {prefill.verdict}")
    return "; ".join(parts)


def _decode_label(rows: int) -> str:
    return f"decode, {rows} {'row' if rows == 1 else 'rows'}"


def _better_peaks(lab: Lab, peaks: Peaks, rows: int, prefill_s: float) -> Peaks:
    """The higher of two compute peaks: of float32 products, and of what the prefill reached.

    The kernels of quantised weights compute in 8-bit integers, and so may do more than float32.
    """
    assert lab.cost is not None
    # The logits of its last token counted too, as the point of the prefill does.
    flops_per_s = lab.cost.step_flops(rows, 1, rows / 2) / prefill_s
    if flops_per_s <= peaks.flops_per_s:
        return peaks
    return replace(peaks, flops_per_s=flops_per_s, flops_source="llama.cpp prefill")


def _prefill(lab: Lab) -> tuple[int, float]:
    """Rows and seconds of the largest call that only computes a prompt; the best of two."""
    c = lab.config
    found = []
    with lab.engine(1, c.prefill_tokens + 1, autostart=False) as engine:
        for prompt in lab.prompts(2, c.prefill_tokens, seed_offset=4):
            handle = engine.submit(prompt, greedy(1))
            while engine.has_work:
                engine.step()
                stats = engine.stats()
                found.append((stats.step_prefill_tokens, stats.step_s))
            del handle
    rows = max(tokens for tokens, _ in found)
    return rows, min(step_s for tokens, step_s in found if tokens == rows)


def _decode_step_s(lab: Lab, size: int) -> float | None:
    """Median seconds inside llama.cpp of steps in which all sequences decode, and nothing else.

    None where there was no such step.
    """
    max_tokens = lab.config.short_max_tokens
    prompts = lab.prompts(size, _PROMPT_TOKENS, seed_offset=5)
    with lab.engine(size, _PROMPT_TOKENS + max_tokens, autostart=False) as engine:
        handles = [engine.submit(prompt, greedy(max_tokens)) for prompt in prompts]
        steps = []
        while engine.has_work:
            engine.step()
            stats = engine.stats()
            if stats.step_prefill_tokens == 0 and stats.step_decode_rows == size:
                steps.append(stats.step_s)
        del handles
    return statistics.median(steps[_SKIPPED_STEPS:] or steps) if steps else None
