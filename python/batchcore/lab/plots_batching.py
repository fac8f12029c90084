"""Plots of parts 1 to 5 as bars and lines: what batching brings, and what lengths cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab.answers_lengths import SLOT, STRATEGIES
from batchcore.lab.answers_sizes import RECOMMENDED, measured_sizes
from batchcore.lab.paths import MissingFigureError
from batchcore.lab.plot_style import ACCENT, COLOURS, INK, bars, new_figure, plain, spread
from batchcore.lab.wording import digits, percent, points, rate, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.lab.answers_sizes import SizeRow
    from batchcore.lab.paths import Figures

__all__ = ["batch_comparison", "batch_size_analysis", "padding_by_strategy", "static_vs_dynamic"]

_MIB = 1 << 20


def batch_comparison(figures: Figures) -> tuple[Any, str]:
    """Time and throughput, one by one against one static batch."""
    modes = ("sequential", "static")
    size = figures.number("parts.static.batch_size")
    names = ["one by one", f"batch of {size:.0f}"]
    times_s, rates = (
        [figures.number(f"parts.{mode}.median.{name}") for mode in modes]
        for name in ("total_s", "output_tokens_per_s")
    )
    figure, (left, right) = new_figure(2.7, 1, 2)
    for axes, title, name, values in (
        (left, "Total time (s)", "total_s", times_s),
        (right, "Output tokens/s", "output_tokens_per_s", rates),
    ):
        plain(axes, title)
        bars(
            axes,
            names,
            values,
            [COLOURS[mode] for mode in modes],
            labels=[digits(value) for value in values],
            spreads=[spread(figures, f"parts.{mode}.runs", name) for mode in modes],
        )
    alt = (
        f"Two bar charts. Total time: {seconds(times_s[0])} one by one, {seconds(times_s[1])} in a "
        f"batch of {size:.0f}. Throughput: {digits(rates[0])} and "
        f"{rate(rates[1], 'output tokens/s')}."
    )
    return figure, alt


def batch_size_analysis(figures: Figures) -> tuple[Any, str]:
    """Throughput and memory over the batch size."""
    rows = measured_sizes(figures)
    sizes = [row.batch_size for row in rows]
    rates = [row.tokens_per_s for row in rows]
    memory = {
        label: values
        for label, name in (("all in use", "memory_bytes"), ("KV cells", "kv_bytes"))
        if (values := _column(figures, rows, name))
    }
    figure, made = new_figure(
        4.6 if memory else 2.6, 2 if memory else 1, squeeze=False, sharex=True
    )
    top, bottom = made[0][0], made[-1][0]
    plain(top, "Throughput (output tokens/s)")
    _with_spread(top, figures, rows)
    if sizes[0] == 1:
        linear = [size * rates[0] for size in sizes]
        top.plot(sizes, linear, "--", color=COLOURS["sequential"], linewidth=1.2, label="linear")
    top.set_ylim(0, 1.2 * max(rates))
    best = figures.peek(RECOMMENDED)
    if best in sizes:
        for axes in (top, bottom)[: 2 if memory else 1]:
            axes.axvline(best, color=ACCENT, linewidth=1.2, linestyle=":")
        top.plot([], [], ":", color=ACCENT, linewidth=1.2, label=f"recommended: {best:.0f}")
    top.legend(loc="lower right")
    if memory:
        plain(bottom, "Memory (MiB)")
        for (label, values), colour in zip(memory.items(), (INK, COLOURS["static"]), strict=False):
            bottom.plot(
                sizes,
                [value / _MIB for value in values],
                "s-",
                color=colour,
                markersize=4,
                label=label,
            )
        bottom.set_ylim(0, 1.15 * max(max(values) for values in memory.values()) / _MIB or 1)
        bottom.legend(loc="best")
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    bottom.minorticks_off()
    bottom.set_xlabel("batch size")
    listed = ", ".join(
        f"{digits(per_s)} with {size:.0f}" for size, per_s in zip(sizes, rates, strict=True)
    )
    alt = f"Lines over the batch size. Output tokens/s: {listed}."
    if "KV cells" in memory:
        first, last = (f"{digits(memory['KV cells'][i] / _MIB)} MiB" for i in (0, -1))
        alt += f" KV memory: {first} with {sizes[0]:.0f}, {last} with {sizes[-1]:.0f}."
    return figure, alt


def _with_spread(axes: Any, figures: Figures, rows: Sequence[SizeRow]) -> None:
    rates = [row.tokens_per_s for row in rows]
    ends = [
        spread(figures, f"{row.path}.runs", "output_tokens_per_s") or (row.tokens_per_s,) * 2
        for row in rows
    ]
    below = [max(0.0, value - low) for value, (low, _) in zip(rates, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(rates, ends, strict=True)]
    axes.errorbar(
        [row.batch_size for row in rows],
        rates,
        yerr=[below, above],
        fmt="o-",
        color=COLOURS["static"],
        ecolor=INK,
        elinewidth=1.2,
        capsize=3,
        markersize=5,
        label="measured",
    )


def _column(figures: Figures, rows: Sequence[SizeRow], name: str) -> list[float]:
    """A figure of each row; empty where one has none."""
    try:
        return [figures.number(f"{row.path}.{name}") for row in rows]
    except MissingFigureError:
        return []


def static_vs_dynamic(figures: Figures) -> tuple[Any, str]:
    """Throughput, latency and busy slots of the two."""
    panels: list[tuple[str, str, Callable[[float], str]]] = [
        ("Output tokens/s", "output_tokens_per_s", digits),
        ("Mean latency (s)", "latency_s.mean", digits),
        ("p95 latency (s)", "latency_s.p95", digits),
    ]
    modes = ("static", "continuous")
    figure, made = new_figure(4.6, 2, 2)
    axes = list(made.flat)
    said = []
    for one, (title, name, label) in zip(axes, panels, strict=False):
        values = [figures.number(f"parts.dynamic.{mode}.{name}") for mode in modes]
        spreads = [spread(figures, f"parts.dynamic.runs.{mode}", name) for mode in modes]
        _pair(one, title, values, list(map(label, values)), spreads)
        said.append(f"{title}: {digits(values[0])} and {digits(values[1])}")
    try:
        idle = [figures.number(f"parts.dynamic.slot_waste.{mode}") for mode in modes]
    except MissingFigureError:
        axes[3].set_axis_off()
    else:
        values = [100 * share for share in idle]
        _pair(axes[3], "Idle slot steps (%)", values, list(map(points, values)))
        said.append(f"Idle slot steps: {percent(idle[0])} and {percent(idle[1])}")
    alt = f"Bar charts of static and continuous batching. {'. '.join(said)}."
    return figure, alt


def _pair(
    axes: Any,
    title: str,
    values: Sequence[float],
    labels: Sequence[str],
    spreads: Sequence[tuple[float, float] | None] | None = None,
) -> None:
    plain(axes, title)
    modes = ("static", "continuous")
    colours = [COLOURS[mode] for mode in modes]
    bars(axes, modes, values, colours, labels=labels, spreads=spreads)


def padding_by_strategy(figures: Figures) -> tuple[Any, str]:
    """Padding of prompts by bucketing strategy, and idle slots by how batches were made."""
    found = []
    for title, path, name, factor, colour in (
        ("Prompt padding (%)", STRATEGIES, "waste_pct", 1, ACCENT),
        ("Idle slot steps of static batches (%)", SLOT, "counted.waste", 100, COLOURS["static"]),
    ):
        try:
            values = [factor * value for value in figures.column(path, name)]
            names = [figures.text(f"{path}[{index}].strategy") for index in range(len(values))]
        except MissingFigureError:
            continue
        found.append((title, names, values, colour))
    if not found:
        raise MissingFigureError(STRATEGIES)
    heights = [0.27 * len(values) + 0.55 for _, _, values, _ in found]
    figure, made = new_figure(
        sum(heights), len(found), squeeze=False, height_ratios=heights, sharex=True
    )
    widest = max(max(values) for _, _, values, _ in found)
    said = []
    for axes, (title, names, values, colour) in zip(made.flat, found, strict=True):
        plain(axes, title, axis="x")
        axes.barh(range(len(values)), values, height=0.62, color=colour)
        for place, value in enumerate(values):
            axes.annotate(
                points(value), (value, place), (3, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(values)), [name.replace("_", " ") for name in names])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * widest or 1)
        each = ", ".join(
            f"{name} {points(value)}" for name, value in zip(names, values, strict=True)
        )
        said.append(f"{title}: {each}")
    return figure, f"Bars by strategy. {'. '.join(said)}."
