"""The six parts of the lab as sections of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.lab.answers import PART_TITLES
from batchcore.lab.answers_bound import POINTS
from batchcore.lab.answers_lengths import SLOT, STRATEGIES
from batchcore.lab.answers_sizes import RECOMMENDED, ROWS, measured_sizes
from batchcore.lab.paths import Figures, MissingFigureError, resolve
from batchcore.lab.view import NOTHING, Column, Section, Table, cell, make_table
from batchcore.lab.wording import digits, percent, points, ratio, seconds, size, span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["build_sections"]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _ms(value: float) -> str:
    return seconds(value / 1e3)


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


_RUN = (
    Column("total", "total_s", seconds),
    Column("output tokens", "num_output_tokens", _whole),
    Column("output tokens/s", "output_tokens_per_s", digits),
    Column("all tokens/s", "total_tokens_per_s", digits),
    Column("mean latency", "latency_s.mean", seconds),
    Column("p95 latency", "latency_s.p95", seconds),
    Column("mean first token", "ttft_s.mean", seconds),
)
_SIZE = (
    Column("total", "total_s", seconds),
    Column("output tokens/s", "output_tokens_per_s", digits),
    Column("all tokens/s", "total_tokens_per_s", digits),
    Column("mean latency", "mean_latency_s", seconds),
    Column("p95 latency", "p95_latency_s", seconds),
    Column("KV cells", "kv_bytes", size),
    Column("memory", "memory_bytes", size),
    Column("note", "note"),
)
_STRATEGY = (
    Column("buckets", "num_buckets", _whole),
    Column("batches", "num_batches", _whole),
    Column("real tokens", "real_tokens", _whole),
    Column("padded tokens", "padded_tokens", _whole),
    Column("waste (%)", "waste_pct", points),
    Column("saved (points)", "saved_pct_points", points),
)
_SLOT = (
    Column("grouped by", "grouped_by"),
    Column("idle, formula", "formula.waste", percent),
    Column("idle, counted", "counted.waste", percent),
    Column("total", "total_s", seconds),
    Column("output tokens/s", "output_tokens_per_s", digits),
)
_LOAD = (
    Column("arrivals/s", "request_rate", digits),
    Column("completed", "summary.num_completed", _whole),
    Column("refused", "num_refused", _whole),
    Column("requests/s", "summary.requests_per_s", digits),
    Column("output tokens/s", "summary.output_tokens_per_s", digits),
    Column("p50 first token", "summary.p50_ttft_ms", _ms),
    Column("p95 first token", "summary.p95_ttft_ms", _ms),
    Column("p95 between tokens", "summary.p95_itl_ms", _ms),
    Column("p95 latency", "summary.p95_e2el_ms", _ms),
)
_POINT = (
    Column("time", "seconds_per_step", seconds),
    Column("operations per byte", "intensity_flops_per_byte", digits),
    Column("of memory peak", "memory_fraction", percent),
    Column("of compute peak", "compute_fraction", percent),
    Column("bound by", "verdict"),
)
_USE: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("slots that gave a token", "slot_use", percent),
    ("rows per call", "rows_per_call", digits),
    ("running sequences", "mean_running", digits),
    ("time inside llama.cpp", "decode_share", percent),
    ("CPU of the process (100% is a core)", "process_cpu_percent", lambda v: f"{points(v)}%"),
    ("CPU of the system", "system_cpu_percent", lambda v: f"{points(v)}%"),
    ("GPU utilisation", "gpu_utilisation_percent", lambda v: f"{points(v)}%"),
    ("GPU memory busy", "gpu_memory_busy_percent", lambda v: f"{points(v)}%"),
    ("memory of the process (peak)", "max_memory_bytes", size),
)
_COMPARED: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("output tokens/s", "output_tokens_per_s", "throughput", digits),
    ("mean latency", "latency_s.mean", "mean_latency", seconds),
    ("p95 latency", "latency_s.p95", "p95_latency", seconds),
    ("mean first token", "ttft_s.mean", "", seconds),
    ("total", "total_s", "", seconds),
)


def build_sections(document: Mapping[str, Any]) -> list[Section]:
    """All six parts; one that was not run says so."""
    fill = {
        "sequential": _sequential,
        "static": _static,
        "batch_sizes": _batch_sizes,
        "padding": _padding,
        "dynamic": _dynamic,
        "scheduler": _scheduler,
    }
    found = []
    for number, (name, title) in enumerate(PART_TITLES.items(), 1):
        section = Section(f"part-{number}", title)
        if not resolve(document, f"parts.{name}"):
            section.missing = (
                "The run was interrupted before it was finished."
                if document.get("interrupted")
                else "It is not part of this run."
            )
        fill[name](Figures(document), section)
        section.tables = [table for table in section.tables if table.rows]
        section.notes = [note for note in section.notes if note]
        found.append(section)
    return found


def _sequential(figures: Figures, section: Section) -> None:
    section.lead = "Each request starts when the one before it has ended."
    path = "parts.sequential"
    rows = [(f"run {i + 1}", f"{path}.runs[{i}]") for i in range(figures.length(f"{path}.runs"))]
    rows.append(("median run", f"{path}.median"))
    section.tables = [make_table(figures, "Runs of all requests, one by one", rows, _RUN)]
    single = cell(figures, f"{path}.single_s", seconds)
    if single != NOTHING:
        section.notes.append(f"One request alone: {single}.")


def _static(figures: Figures, section: Section) -> None:
    section.lead = "All requests start together and run as one batch, until the last has ended."
    path = "parts.static"
    rows = [("one by one", "parts.sequential.median"), ("static batch", f"{path}.median")]
    section.tables = [
        make_table(figures, "One by one against one static batch (median runs)", rows, _RUN),
        _use_table(
            figures, {"one by one": "parts.sequential", "static batch": path}, ".utilisation"
        ),
        make_table(
            figures,
            "Steps under the roofline",
            [
                (cell(figures, f"{POINTS}[{i}].label", str), f"{POINTS}[{i}]")
                for i in range(figures.length(POINTS))
            ],
            _POINT,
            head="step",
        ),
    ]
    section.plots = ["batch_comparison", "roofline"]
    section.notes.append(figures.sentences(_speedup_note, _verdict_note))


def _speedup_note(figures: Figures) -> str:
    return f"Speed-up in throughput, paired by repeat: {_ratio(figures, 'parts.static.speedup')}."


def _verdict_note(figures: Figures) -> str:
    return f"Roofline: {figures.text('roofline.verdict')}."


def _ratio(figures: Figures, path: str) -> str:
    middle, low, high = (figures.number(f"{path}.{end}") for end in ("median", "low", "high"))
    return f"{ratio(middle)} ({span((ratio(low), ratio(high)))})"


def _use_table(figures: Figures, runs: Mapping[str, str], below: str = "") -> Table:
    """Utilisation, with a column for each run."""
    rows = []
    for label, name, say in _USE:
        cells = [cell(figures, f"{path}{below}.{name}", say) for path in runs.values()]
        if any(text != NOTHING for text in cells):
            rows.append([label, *cells])
    return Table("Utilisation, on average", ["", *runs], rows, [True, *([False] * len(runs))])


def _batch_sizes(figures: Figures, section: Section) -> None:
    section.lead = "As many requests as the batch size, in one batch."
    rows = [
        (cell(figures, f"{ROWS}[{i}].batch_size", _whole), f"{ROWS}[{i}]")
        for i in range(figures.length(ROWS))
    ]
    table = make_table(figures, "Batch sizes", rows, _SIZE, head="batch size")
    section.tables = [table, _efficiency(figures)]
    section.plots = ["batch_size_analysis"]
    section.notes.append(figures.sentences(_recommended))


def _efficiency(figures: Figures) -> Table:
    """How much of linear scaling each size keeps; no rows where that can't be said."""
    try:
        sizes = measured_sizes(figures)
    except MissingFigureError:
        sizes = []
    rows = []
    if sizes and sizes[0].batch_size == 1:
        one = sizes[0].tokens_per_s
        for row in sizes:
            gain = row.tokens_per_s / one
            rows.append([_whole(row.batch_size), ratio(gain), percent(gain / row.batch_size)])
    headers = ["batch size", "throughput against 1", "of linear"]
    return Table("Scaling: throughput(B) / throughput(1)", headers, rows, [True, False, False])


def _recommended(figures: Figures) -> str:
    best = figures.number(RECOMMENDED)
    reason, rule = (
        figures.text(f"parts.batch_sizes.recommended.{name}") for name in ("reason", "rule")
    )
    return f"Recommended: {best:.0f}. {reason} (rule: {rule})."


def _padding(figures: Figures, section: Section) -> None:
    section.lead = (
        "Prompts and outputs of differing lengths: what rectangles would pad, and how long slots "
        "of static batches stand idle."
    )
    slots = [
        (cell(figures, f"{SLOT}[{i}].strategy", str), f"{SLOT}[{i}]")
        for i in range(figures.length(SLOT))
    ]
    strategies = [
        (cell(figures, f"{STRATEGIES}[{i}].strategy", str), f"{STRATEGIES}[{i}]")
        for i in range(figures.length(STRATEGIES))
    ]
    section.tables = [
        make_table(
            figures, "Padding of prompts by strategy", strategies, _STRATEGY, head="strategy"
        ),
        make_table(figures, "Idle slots of static batches", slots, _SLOT, head="batches"),
    ]
    section.plots = ["padding_by_strategy"]
    section.notes.append(figures.sentences(_formula, _continuous))


def _formula(figures: Figures) -> str:
    waste = figures.number("parts.padding.lab_formula_waste_pct")
    return f"The lab's formula gives {points(waste)}% waste for these prompts in one batch."


def _continuous(figures: Figures) -> str:
    per_s = figures.number("parts.padding.continuous.output_tokens_per_s")
    return f"The same requests, continuously batched: {digits(per_s)} output tokens/s."


def _dynamic(figures: Figures, section: Section) -> None:
    section.lead = (
        "The same requests in static batches, and continuously: a request takes a slot as soon as "
        "another one ends."
    )
    path = "parts.dynamic"
    rows = []
    for label, name, improvement, say in _COMPARED:
        cells = [cell(figures, f"{path}.{mode}.{name}", say) for mode in ("static", "continuous")]
        try:
            change = _ratio(figures, f"{path}.improvement.{improvement}")
        except MissingFigureError:
            change = NOTHING
        if cells != [NOTHING, NOTHING]:
            rows.append([label, *cells, change])
    headers = ["", "static", "continuous", "continuous / static"]
    modes = {mode: f"{path}.utilisation.{mode}" for mode in ("static", "continuous")}
    section.tables = [
        Table("Median runs, and ratios paired by repeat", headers, rows, [True, *([False] * 3)]),
        _use_table(figures, modes),
    ]
    section.plots = ["static_vs_dynamic", "latency_distributions", "utilisation_over_time"]
    section.notes.append(figures.sentences(_unread))


def _unread(figures: Figures) -> str | None:
    missing = figures.need("monitor.static.missing")
    if not isinstance(missing, dict) or not missing:
        return None
    return f"Not read: {'; '.join(f'{name} ({why})' for name, why in missing.items())}."


def _scheduler(figures: Figures, section: Section) -> None:
    section.lead = "Requests arrive over time, as a Poisson process."
    path = "parts.scheduler"
    rows = [
        (
            cell(figures, f"{path}.loads[{i}].capacity_fraction", lambda v: f"{100 * v:.0f}%"),
            f"{path}.loads[{i}]",
        )
        for i in range(figures.length(f"{path}.loads"))
    ]
    section.tables = [
        make_table(figures, "Loads, as shares of the capacity", rows, _LOAD, head="load")
    ]
    capacity = cell(figures, f"{path}.capacity_requests_per_s", digits)
    if capacity != NOTHING:
        section.notes.append(f"Capacity: {capacity} requests/s.")
    note = cell(figures, f"{path}.note", str)
    if note != NOTHING:
        section.notes.append(note)
