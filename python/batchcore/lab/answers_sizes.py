"""Questions 6 to 8: how large a batch should be, how throughput grows with it, where it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchcore.lab.paths import MissingFigureError, is_number
from batchcore.lab.wording import percent, rate, ratio, seconds, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchcore.lab.paths import Figures

__all__ = [
    "RECOMMENDED",
    "ROWS",
    "SizeRow",
    "has_gpu",
    "is_linear",
    "keep",
    "main_device",
    "measured_sizes",
    "optimal_size",
    "what_limits",
]

ROWS = "parts.batch_sizes.rows"
RECOMMENDED = "parts.batch_sizes.recommended.batch_size"

_NEARLY = 0.9
_HALF = 0.5
_GPU_TYPES = {"gpu", "igpu"}


@dataclass(frozen=True, slots=True)
class SizeRow:
    """A batch size that ran."""

    path: str
    batch_size: float
    tokens_per_s: float
    """Output tokens."""


def measured_sizes(figures: Figures) -> list[SizeRow]:
    """Every batch size that ran, smallest first; `keep` those that are used.

    Raises:
        MissingFigureError: There is none.
    """
    found = []
    for index in range(figures.length(ROWS)):
        path = f"{ROWS}[{index}]"
        values = [figures.peek(f"{path}.{name}") for name in ("batch_size", "output_tokens_per_s")]
        is_there = all(is_number(value) and value > 0 for value in values)
        if is_there and figures.peek(f"{path}.fits") is not False:
            found.append(SizeRow(path, *values))
    if not found:
        raise MissingFigureError(ROWS)
    return sorted(found, key=lambda row: row.batch_size)


def keep(figures: Figures, *rows: SizeRow) -> None:
    """Note that the batch size and throughput of rows were used."""
    for row in rows:
        figures.number(f"{row.path}.batch_size")
        figures.number(f"{row.path}.output_tokens_per_s")


def optimal_size(figures: Figures) -> tuple[str, str]:
    """Question 6."""
    best = figures.number(RECOMMENDED)
    row = figures.find(ROWS, "batch_size", best)
    per_s = figures.number(f"{row}.output_tokens_per_s")

    def latency(figures: Figures) -> str:
        return f"Its p95 latency is {seconds(figures.number(f'{row}.p95_latency_s'))}."

    def rule(figures: Figures) -> str:
        return f"Rule: {figures.text('parts.batch_sizes.recommended.rule')}."

    def reason(figures: Figures) -> str:
        return f"Here: {figures.text('parts.batch_sizes.recommended.reason')}."

    def fastest(figures: Figures) -> str:
        top = max(measured_sizes(figures), key=lambda one: one.tokens_per_s)
        if top.path == row:
            return "No other batch size that was measured has a higher throughput."
        keep(figures, top)
        p95_s = figures.number(f"{top.path}.p95_latency_s")
        return (
            f"The highest throughput is that of {top.batch_size:.0f}, "
            f"{rate(top.tokens_per_s, 'output tokens/s')} with a p95 latency of {seconds(p95_s)}."
        )

    answer = f"{best:.0f}: {rate(per_s, 'output tokens/s')}. {figures.sentences(latency)}"
    return answer.strip(), figures.sentences(rule, reason, fastest)


def is_linear(figures: Figures) -> tuple[str, str]:
    """Question 7."""
    sizes = measured_sizes(figures)
    if len(sizes) < 2 or sizes[0].batch_size != 1:
        raise MissingFigureError(ROWS)
    keep(figures, *sizes)
    one, last = sizes[0].tokens_per_s, sizes[-1]
    shares = {row.batch_size: row.tokens_per_s / (row.batch_size * one) for row in sizes[1:]}
    answer = (
        f"{'Nearly' if shares[last.batch_size] >= _NEARLY else 'No'}: with {last.batch_size:.0f} "
        f"sequences throughput is {ratio(last.tokens_per_s / one)} that of one, "
        f"{percent(shares[last.batch_size])} of linear"
    )
    below = next((batch_size for batch_size, share in shares.items() if share < _HALF), None)
    if below is None:
        answer += ", and the efficiency stays above 50% for all that were measured."
    else:
        answer += f"; the efficiency falls under 50% at batch size {below:.0f}."
    each = ", ".join(f"{percent(share)} with {rows:.0f}" for rows, share in shares.items())
    return answer, f"Efficiency, throughput(B) / (B x throughput(1)): {each}. {_fit(sizes)}".strip()


def _fit(sizes: Sequence[SizeRow]) -> str:
    """The line through the time for a token of each sequence; empty where it explains nothing."""
    if len({row.batch_size for row in sizes}) < 3:
        return ""
    rows = [row.batch_size for row in sizes]
    step_s = [row.batch_size / row.tokens_per_s for row in sizes]
    mean_rows, mean_s = sum(rows) / len(rows), sum(step_s) / len(step_s)
    each = sum((x - mean_rows) * (y - mean_s) for x, y in zip(rows, step_s, strict=True))
    each_s = each / sum((x - mean_rows) ** 2 for x in rows)
    fixed_s = mean_s - each_s * mean_rows
    if each_s <= 0 or fixed_s <= 0:
        return ""
    return (
        f"A token for each of B sequences takes about {seconds(fixed_s)} + B x {seconds(each_s)} "
        "(least squares over B / throughput(B), prompts included): the fixed part is shared by "
        "ever more sequences, the other is not, so that throughput levels off towards "
        f"{rate(1 / each_s, 'output tokens/s')}."
    )


def what_limits(figures: Figures) -> tuple[str, str]:
    """Question 8."""
    sizes = measured_sizes(figures)
    last = sizes[-1]
    reasoning = figures.sentences(
        lambda figures: _memory_limit(figures, sizes),
        lambda figures: _latency_limit(figures, sizes),
    )
    for index in range(figures.length(ROWS)):
        path = f"{ROWS}[{index}]"
        if figures.peek(f"{path}.fits") is False:
            rows = figures.number(f"{path}.batch_size")
            figures.number(f"{last.path}.batch_size")
            why = f": {figures.text(f'{path}.note')}" if figures.peek(f"{path}.note") else ""
            answer = f"Memory: {rows:.0f} does not fit, {last.batch_size:.0f} does{why}."
            return answer, reasoning
    keep(figures, *sizes[-2:])
    answer = (
        f"Memory for the KV cells in the end, but not among what was measured: all up to "
        f"{last.batch_size:.0f} fit."
    )
    if len(sizes) > 1:
        answer += (
            f" What limits it before is use: with {last.batch_size:.0f} throughput is "
            f"{ratio(last.tokens_per_s / sizes[-2].tokens_per_s)} that with "
            f"{sizes[-2].batch_size:.0f}."
        )
    return answer, reasoning


def main_device(figures: Figures) -> str:
    """Path of the device that holds the KV cells: the first GPU, or the first of any kind."""
    devices = "environment.devices"
    for index in range(figures.length(devices)):
        if figures.peek(f"{devices}[{index}].type") in _GPU_TYPES:
            return f"{devices}[{index}]"
    return f"{devices}[0]"


def has_gpu(figures: Figures) -> bool:
    """Whether the engine had one."""
    return figures.peek(f"{main_device(figures)}.type") in _GPU_TYPES


def _memory_limit(figures: Figures, sizes: Sequence[SizeRow]) -> str | None:
    first, last = sizes[0], sizes[-1]
    for row in (first, last):
        figures.number(f"{row.path}.batch_size")
    kv = [figures.number(f"{row.path}.kv_bytes") for row in (first, last)]
    if last.batch_size <= first.batch_size or kv[1] <= kv[0]:
        return None
    each = (kv[1] - kv[0]) / (last.batch_size - first.batch_size)

    def room(figures: Figures) -> str:
        device = main_device(figures)
        total = figures.number(f"{device}.memory_total_bytes")
        used = figures.number(f"{last.path}.memory_bytes")
        more = max(0, int((total - used) // each))
        return (
            f"Of the {size(total)} of device {figures.text(f'{device}.name')}, {size(used)} are "
            f"used with {last.batch_size:.0f}; "
            f"the rest would hold the KV cells of about {more:,} more."
        )

    return (
        f"KV memory grows by {size(each)} with each sequence, from {size(kv[0])} with "
        f"{first.batch_size:.0f} to {size(kv[1])} with {last.batch_size:.0f}. "
        f"{figures.sentences(room)}"
    ).strip()


def _latency_limit(figures: Figures, sizes: Sequence[SizeRow]) -> str | None:
    first, last = sizes[0], sizes[-1]
    if first is last:
        return None
    for row in (first, last):
        figures.number(f"{row.path}.batch_size")
    p95_s = [figures.number(f"{row.path}.p95_latency_s") for row in (first, last)]
    return (
        f"p95 latency goes from {seconds(p95_s[0])} with {first.batch_size:.0f} to "
        f"{seconds(p95_s[1])} with {last.batch_size:.0f}, which users may not accept long before "
        "memory ends."
    )
