"""What the studies share: the devices that they simulate, capacity, tables, plots, files."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from batchcore.bench.environment import describe_environment
from batchcore.lab.paths import Figures
from batchcore.lab.plot_style import ACCENT, COLOURS, INK, render
from batchcore.simulation import SimDevice, SimResult, Trace, simulate
from batchcore.stats import Histogram
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.simulation import SimEngineOptions
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "scheduling"

# Told apart by lightness too.
PALETTE = (COLOURS["continuous"], COLOURS["static"], ACCENT, "#8a4fa3", COLOURS["sequential"], INK)

GPU = SimDevice(
    base_s=5e-3,
    prefill_token_s=20e-6,
    decode_row_s=40e-6,
    kv_token_s=1e-9,
    copied_token_s=5e-6,
)
"""As a large GPU with a model of some billions of parameters: most of a call is reading weights."""

SMALL = SimDevice(
    base_s=20e-3,
    prefill_token_s=0.3e-3,
    decode_row_s=1e-3,
    kv_token_s=2e-9,
    copied_token_s=5e-6,
)
"""A device where a row costs something: sixteen rows nearly double what a call takes."""

GPU_OPTIONS: SimEngineOptions = {
    "max_num_seqs": 64,
    "n_ctx": 65_536,
    "n_ubatch": 512,
    # Enough for whatever overload a study has: it is policies that refuse here, not bounds.
    "max_queued_requests": 1_000_000,
    "max_queued_tokens": 1_000_000_000,
}
CHAT: dict[str, Any] = {
    "prompt_tokens": "lognormal:200:0.7:10:1500",
    "output_tokens": "lognormal:120:0.6:5:600",
}
"""Lengths of an everyday chat."""


def capacity_per_s(
    device: SimDevice, options: SimEngineOptions, lengths: dict[str, Any], seed: int = 99
) -> float:
    """Requests per second that an engine finishes where there are always more."""
    drawn = Trace.poisson(100.0, 20.0, seed=seed, **lengths)
    trace = drawn.replaced(arrival_s=np.zeros(len(drawn)))
    result = simulate(trace, device, **options)
    # Between a tenth and nine: neither the first prompts alone nor the last stragglers.
    early, late = np.percentile(result.finished_s, [10, 90])
    return 0.8 * len(trace) / float(late - early)


def between(before: Histogram, after: Histogram) -> Histogram:
    """What was counted from one sample to a later one."""
    counts = np.array(after.counts, np.int64)
    counts[: len(before.counts)] -= np.array(before.counts, np.int64)
    return Histogram(tuple(int(count) for count in counts), after.sum - before.sum)


def with_trace(result: SimResult, trace: Trace) -> SimResult:
    """A result of the same requests under other names: to see whose they were all the same."""
    return SimResult(trace, result.device, result.outcomes, result.stats, result.samples)


class Study:
    """One run of a study: reads its options, keeps its figures, writes its files."""

    def __init__(self, name: str, description: str | None) -> None:
        """Start the clock."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--seed", type=int, default=1, help="of all that is drawn")
        parser.add_argument(
            "--out", type=Path, default=RESULTS, help="folder for the figures and the plot"
        )
        self.options = parser.parse_args()
        self.name = name
        self.document: dict[str, Any] = {"study": name, "simulated": True}
        self._start = time.perf_counter()

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return int(self.options.seed)

    def table(self, title: str, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows under a key, and print them."""
        self.document[key] = [{name: _plain(value) for name, value in row.items()} for row in rows]
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(
                column, justify="left" if isinstance(rows[0][column], str) else "right"
            )
        for row in rows:
            table.add_row(*(_short(value) for value in row.values()))
        Console(width=160).print(table)

    def finish(self, draw: Callable[[], Figure] | None) -> None:
        """Write the figures, with the time that they took and where, and the plot."""
        environment = describe_environment()
        # The second one says what it takes where others use the machine too.
        self.document["wall_s"] = round(time.perf_counter() - self._start, 1)
        self.document["cpu_s"] = round(time.process_time(), 1)
        self.document["machine"] = {
            name: environment[name]
            for name in ("command", "time", "cpu", "num_usable_cores", "load_average_1min")
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        if draw is not None:
            plot = render(self.name, self.name, lambda _: (draw(), ""), Figures({}))
            (self.options.out / f"{self.name}.png").write_bytes(plot.png)
        text = json.dumps(self.document, indent=1, allow_nan=False)
        (self.options.out / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        Console().print(
            f"{self.name}: {self.document['wall_s']} s wall, {self.document['cpu_s']} s CPU"
        )


def new_figure(
    height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure as wide as a page, and its axes."""
    figure = Figure(figsize=(8.2, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """Logarithmic, with plain numbers: the style of the plots has no mathematical text."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all axes, where no curve can be."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return int(value) if isinstance(value, np.integer) else value


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)
