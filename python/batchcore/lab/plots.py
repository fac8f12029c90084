"""The plots of a report: drawn with matplotlib, without its global state, always the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.lab import plots_batching, plots_detail
from batchcore.lab.answers import say_what_is_missing
from batchcore.lab.paths import Figures, MissingFigureError
from batchcore.lab.plot_style import Plot, check_matplotlib, render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PLOT_TITLES", "Plot", "Plots", "check_matplotlib", "draw_plots"]

_DRAWN: dict[str, tuple[str, Callable[[Figures], tuple[Any, str]]]] = {
    "batch_comparison": ("One by one against a static batch", plots_batching.batch_comparison),
    "batch_size_analysis": (
        "Throughput and memory by batch size",
        plots_batching.batch_size_analysis,
    ),
    "padding_by_strategy": ("What differing lengths waste", plots_batching.padding_by_strategy),
    "static_vs_dynamic": ("Static against continuous batching", plots_batching.static_vs_dynamic),
    "latency_distributions": ("Latency of single requests", plots_detail.latency_distributions),
    "utilisation_over_time": ("Utilisation over time", plots_detail.utilisation_over_time),
    "roofline": ("Roofline of the model on this machine", plots_detail.roofline),
}

_WITH_WHISKERS = {"batch_comparison", "batch_size_analysis", "static_vs_dynamic"}

PLOT_TITLES = {name: title for name, (title, _) in _DRAWN.items()}
"""All plots that there can be, by the names of their files."""


@dataclass(frozen=True, slots=True)
class Plots:
    """Those that could be drawn, and why others could not."""

    drawn: Mapping[str, Plot]
    skipped: Mapping[str, str]
    """A sentence for each, by name."""


def draw_plots(document: Mapping[str, Any]) -> Plots:
    """Draw all plots that a document has the figures for.

    Raises:
        ConfigError: matplotlib is missing.
    """
    drawn: dict[str, Plot] = {}
    skipped: dict[str, str] = {}
    for name in _DRAWN:
        plot = _draw(document, name)
        if isinstance(plot, Plot):
            drawn[name] = plot
        else:
            skipped[name] = plot
    return Plots(drawn, skipped)


def _draw(document: Mapping[str, Any], name: str) -> Plot | str:
    """A plot, or why there is none."""
    title, draw = _DRAWN[name]
    whiskers = "; whiskers: lowest and highest repeat" if name in _WITH_WHISKERS else ""
    try:
        return render(name, title + whiskers, draw, Figures(document))
    except MissingFigureError as missing:
        return say_what_is_missing(document, missing.path)
