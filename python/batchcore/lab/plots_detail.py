"""Plots of single requests, of time, and of the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab.answers_bound import decode_points, prefill_points
from batchcore.lab.paths import MissingFigureError, is_number
from batchcore.lab.plot_style import ACCENT, COLOURS, INK, new_figure, plain
from batchcore.lab.wording import digits, seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchcore.lab.paths import Figures

__all__ = ["latency_distributions", "roofline", "utilisation_over_time"]

_MODES = ("static", "continuous")
_GIGA = 1e9


def latency_distributions(figures: Figures) -> tuple[Any, str]:
    """How many requests had ended, and had their first token, after which time."""
    panels = [
        (title, lists)
        for title, name in (("Latency (s)", "latencies_s"), ("First token (s)", "ttfts_s"))
        if (lists := _lists(figures, name))
    ]
    if not panels:
        return _percentiles(figures)
    figure, made = new_figure(2.5 * len(panels), len(panels), squeeze=False)
    for axes, (title, lists) in zip(made.flat, panels, strict=True):
        plain(axes, title)
        for mode, values in lists.items():
            ordered = sorted(values)
            shares = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step(
                [ordered[0], *ordered], [0, *shares], where="post", color=COLOURS[mode], label=mode
            )
        axes.set_ylim(0, 104)
        axes.set_xlim(0)
        axes.set_yticks([0, 50, 95], ["0", "50", "95"])
        axes.set_ylabel("% of requests")
        axes.legend(loc="lower right")
    return figure, f"Cumulative distributions over requests. {_said_latencies(figures)}"


def _lists(figures: Figures, name: str) -> dict[str, list[float]]:
    """Of each mode that has such a list, with numbers only."""
    found = {}
    for mode in _MODES:
        values = figures.peek(f"parts.dynamic.{mode}.{name}")
        if isinstance(values, list) and (numbers := _numbers(values)):
            found[mode] = numbers
    return found


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if is_number(value)]


def _percentiles(figures: Figures) -> tuple[Any, str]:
    names = ("mean", "p50", "p95", "p99")
    values = {
        mode: [figures.number(f"parts.dynamic.{mode}.latency_s.{name}") for name in names]
        for mode in _MODES
    }
    figure, axes = new_figure(2.6)
    plain(axes, "Latency (s)")
    for offset, (mode, heights) in zip((-0.2, 0.2), values.items(), strict=True):
        places = [place + offset for place in range(len(names))]
        axes.bar(places, heights, width=0.38, color=COLOURS[mode], label=mode)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0)
    axes.legend(loc="upper left")
    return figure, f"Bars of mean and percentiles. {_said_latencies(figures)}"


def _said_latencies(figures: Figures) -> str:
    parts = []
    for mode in _MODES:
        try:
            p50, p95 = (
                seconds(figures.number(f"parts.dynamic.{mode}.latency_s.{name}"))
                for name in ("p50", "p95")
            )
        except MissingFigureError:
            continue
        parts.append(f"{mode} p50 {p50}, p95 {p95}")
    return f"Latency: {'; '.join(parts)}." if parts else ""


def utilisation_over_time(figures: Figures) -> tuple[Any, str]:
    """Running sequences and busy processors (or GPU) while the two ran."""
    kinds = [("num_running", "Running sequences")]
    gpu = ("gpu0_utilisation_percent", "GPU utilisation (%)")
    has_gpu = any(_samples(figures, mode, gpu[0]) for mode in _MODES)
    kinds.append(gpu if has_gpu else ("process_cpu_percent", "CPU of the process (%)"))
    panels = []
    for column, title in kinds:
        lines = {mode: line for mode in _MODES if (line := _samples(figures, mode, column))}
        if lines:
            panels.append((title, column, lines))
    if not panels:
        raise MissingFigureError("monitor.static.columns")
    figure, made = new_figure(2.2 * len(panels), len(panels), squeeze=False, sharex=True)
    said = []
    for axes, (title, column, lines) in zip(made.flat, panels, strict=True):
        plain(axes, title)
        for mode, (times_s, values) in lines.items():
            axes.plot(times_s, values, color=COLOURS[mode], linewidth=1.3, label=mode)
            mean = figures.peek(f"monitor.{mode}.summary.{column}.mean")
            if is_number(mean):
                said.append(f"{title}: {digits(mean)} on average, {mode}")
        axes.set_xlim(0)
        axes.set_ylim(0, 1.12 * max(max(line[1]) for line in lines.values()) or 1)
    made[-1][0].set_xlabel("time (s)")
    handles, labels = made[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure, " ".join(["Lines over time.", *(f"{one}." for one in said)])


def _samples(figures: Figures, mode: str, column: str) -> tuple[list[float], list[float]] | None:
    """Times and values where there are both."""
    columns = f"monitor.{mode}.columns"
    times_s, values = figures.peek(f"{columns}.time_s"), figures.peek(f"{columns}.{column}")
    if not isinstance(times_s, list) or not isinstance(values, list):
        return None
    pairs = [
        (time_s, value)
        for time_s, value in zip(times_s, values, strict=False)
        if is_number(time_s) and is_number(value)
    ]
    return ([pair[0] for pair in pairs], [pair[1] for pair in pairs]) if pairs else None


def roofline(figures: Figures) -> tuple[Any, str]:
    """What steps reached, under what memory and arithmetic allow."""
    bandwidth = figures.positive("roofline.peaks.bytes_per_s")
    peak = figures.positive("roofline.peaks.flops_per_s")
    groups = {
        "decode steps": (decode_points(figures), "o", COLOURS["static"]),
        "prefill": (prefill_points(figures), "D", COLOURS["continuous"]),
    }
    places = {
        label: [_place(figures, path) for path in paths] for label, (paths, _, _) in groups.items()
    }
    everything = [place for some in places.values() for place in some]
    if not everything:
        raise MissingFigureError("roofline.points")
    ridge = peak / bandwidth
    low = min(ridge, *(x for x, _, _ in everything)) / 2
    high = max(ridge, *(x for x, _, _ in everything)) * 2
    figure, axes = new_figure(3.3)
    axes.plot(
        [low, ridge, high],
        [low * bandwidth / _GIGA, peak / _GIGA, peak / _GIGA],
        color=INK,
        label=f"roof: {digits(bandwidth / _GIGA)} GB/s, {digits(peak / _GIGA)} GFLOP/s",
    )
    axes.axvline(ridge, color=ACCENT, linewidth=1, linestyle=":", label=f"ridge: {digits(ridge)}")
    for label, (_, marker, colour) in groups.items():
        if places[label]:
            xs, ys = ([place[axis] for place in places[label]] for axis in (0, 1))
            axes.plot(xs, ys, marker, color=colour, markersize=6, label=f"{label}, by rows")
        for x, y, rows in places[label]:
            axes.annotate(
                f"{rows:.0f}", (x, y), (0, -6), textcoords="offset points", ha="center", va="top"
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    bottom = min(low * bandwidth / _GIGA, *(y for _, y, _ in everything))
    axes.set_ylim(bottom / 3, 2 * peak / _GIGA)
    axes.set_title("Attained GFLOP/s")
    axes.set_xlabel("operations per byte")
    axes.grid(visible=True)
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_formatter(lambda value, _: f"{value:g}")
        one.set_minor_formatter(lambda *_: "")
    axes.legend(loc="best")
    said = ", ".join(
        f"{rows:.0f} at {digits(x)} and {digits(y)} GFLOP/s"
        for x, y, rows in places["decode steps"]
    )
    return figure, (
        f"Roofline with its ridge at {digits(ridge)} operations per byte. Decode steps, rows at "
        f"operations per byte: {said}."
    )


def _place(figures: Figures, path: str) -> tuple[float, float, float]:
    """Operations per byte, GFLOP/s that were reached, and rows."""
    flops, step_s = (
        figures.positive(f"{path}.{name}") for name in ("step_flops", "seconds_per_step")
    )
    intensity = figures.positive(f"{path}.intensity_flops_per_byte")
    return intensity, flops / step_s / _GIGA, figures.number(f"{path}.rows")
