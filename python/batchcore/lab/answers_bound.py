"""Question 5: what bounds a step, memory or arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchcore.lab.answers_sizes import has_gpu, keep, measured_sizes
from batchcore.lab.paths import MissingFigureError, is_number
from batchcore.lab.wording import count, digits, listed, percent, points, rate

if TYPE_CHECKING:
    from batchcore.lab.paths import Figures

__all__ = ["POINTS", "RIDGE", "decode_points", "prefill_points", "say_verdict", "what_bounds"]

POINTS = "roofline.points"
RIDGE = "roofline.peaks.ridge_flops_per_byte"

_NEARLY = 0.9
_GPU_FIGURES = (
    "parts.static.utilisation.gpu_{}_percent",
    "monitor.static.summary.gpu0_{}_percent.mean",
    "monitor.continuous.summary.gpu0_{}_percent.mean",
)


def decode_points(figures: Figures) -> list[str]:
    """Paths of the points of decode steps, fewest rows first: all rows ask for logits."""
    return _points(figures, is_decode=True)


def prefill_points(figures: Figures) -> list[str]:
    """Paths of the other points."""
    return _points(figures, is_decode=False)


def _points(figures: Figures, *, is_decode: bool) -> list[str]:
    found = []
    for index in range(figures.length(POINTS)):
        path = f"{POINTS}[{index}]"
        rows, outputs = figures.peek(f"{path}.rows"), figures.peek(f"{path}.outputs")
        if is_number(rows) and (outputs is None or outputs == rows) == is_decode:
            found.append((rows, path))
    return [path for _, path in sorted(found)]


def what_bounds(figures: Figures) -> tuple[str, str]:
    """Question 5."""
    if has_gpu(figures):
        return _gpu_bound(figures)
    decode, prefill = decode_points(figures), prefill_points(figures)
    if not decode:
        raise MissingFigureError(POINTS)
    ends = [_point(figures, path) for path in dict.fromkeys((decode[0], decode[-1]))]
    same = f"{say_verdict(figures, decode[0])} with "
    if len(ends) > 1 and ends[1].startswith(same):
        ends[1] = f"with {ends[1].removeprefix(same)}"
    answer = f"No GPU is used in this run. The CPU is, by its roofline, {listed(ends)}."

    def roofs(figures: Figures) -> str:
        num_bytes = figures.number("roofline.peaks.bytes_per_s")
        flops = figures.number("roofline.peaks.flops_per_s")
        return (
            f"Measured peaks: {digits(num_bytes / 1e9)} GB/s and {digits(flops / 1e9)} GFLOP/s, "
            f"which is a ridge point of {digits(figures.number(RIDGE))} operations per byte."
        )

    def intensities(figures: Figures) -> str:
        values = []
        for path in decode:
            rows = figures.number(f"{path}.rows")
            intensity = figures.number(f"{path}.intensity_flops_per_byte")
            values.append(f"{digits(intensity)} with {rows:.0f}")
        return f"Operations per byte by rows of a decode step: {', '.join(values)}."

    def prompts(figures: Figures) -> str | None:
        return f"A prefill is {_point(figures, prefill[-1])}." if prefill else None

    def verdict(figures: Figures) -> str:
        return f"Over all points: {figures.text('roofline.verdict')}."

    return answer, figures.sentences(roofs, intensities, prompts, verdict)


def say_verdict(figures: Figures, path: str) -> str:
    """What bounds a point, to be put behind "is"."""
    verdict = figures.text(f"{path}.verdict")
    return "bound by overhead" if verdict.startswith("neither") else verdict


def _point(figures: Figures, path: str) -> str:
    rows = figures.number(f"{path}.rows")
    memory, compute = (figures.number(f"{path}.{roof}_fraction") for roof in ("memory", "compute"))
    return (
        f"{say_verdict(figures, path)} with {count(rows, 'row')} ({percent(memory)} of the "
        f"memory peak, {percent(compute)} of the compute peak)"
    )


def _gpu_bound(figures: Figures) -> tuple[str, str]:
    """By how throughput grows and what NVML says: the peaks are not those of a GPU."""
    sizes = measured_sizes(figures)
    if len(sizes) < 2:
        raise MissingFigureError("parts.batch_sizes.rows[1]")
    few, more = sizes[:2]
    keep(figures, few, more)
    kept = more.tokens_per_s / few.tokens_per_s * few.batch_size / more.batch_size
    bound = "memory-bound with few rows" if kept >= _NEARLY else "not memory-bound alone"

    def busy(figures: Figures) -> str:
        share = figures.first_number(*(path.format("utilisation") for path in _GPU_FIGURES))
        return f"The GPU had work {points(share)}% of the time."

    def memory(figures: Figures) -> str:
        share = figures.first_number(*(path.format("memory_busy") for path in _GPU_FIGURES))
        return f"Its memory was busy {points(share)}% of the time."

    return (
        f"The GPU is {bound}: from batch size {few.batch_size:.0f} to {more.batch_size:.0f} "
        f"throughput goes from {digits(few.tokens_per_s)} to "
        f"{rate(more.tokens_per_s, 'output tokens/s')}, {percent(kept)} of linear, and rows are "
        "nearly free as long as a step only waits for the weights.",
        figures.sentences(busy, memory),
    )
