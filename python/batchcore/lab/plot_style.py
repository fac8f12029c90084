"""How the plots of a report look, and how they become files: alike for all, and always the same."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchcore.errors import ConfigError
from batchcore.lab.paths import Figures, MissingFigureError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "COLOURS",
    "INK",
    "Plot",
    "bars",
    "check_matplotlib",
    "new_figure",
    "plain",
    "render",
    "spread",
]

# Told apart by lightness too, and by those who don't see red or green.
COLOURS = {"sequential": "#7b8794", "static": "#1f6fb2", "continuous": "#d9660a"}
ACCENT = "#2f7d5b"
INK = "#222b36"
_GRID = "#dde2e8"

_WIDTH_INCHES = 4.8  # as wide as a phone, so that 9 points stay legible there
_DPI = 110
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
    "legend.facecolor": "white",
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchcore",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot, ready to be written."""

    name: str
    """Of its files, without the ending."""
    title: str
    alt: str
    """What it shows, in words."""
    svg: str
    png: bytes


def check_matplotlib() -> None:
    """See that plots can be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - a dependency of an extra, and slow
    except ImportError as error:
        raise ConfigError(
            "the report's plots need matplotlib: pip install 'batchcore[lab]'"
        ) from error


def render(
    name: str, title: str, draw: Callable[[Figures], tuple[Figure, str]], figures: Figures
) -> Plot:
    """Draw, as files in memory. The style is that of a report, whatever the user has set.

    Raises:
        ConfigError: matplotlib is missing.
        MissingFigureError: The document has nothing to draw.
    """
    check_matplotlib()
    import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = mpl.rcParams  # whose type has every name in it
        settings.update(_STYLE)
        figure, alt = draw(figures)
        svg, png = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Plot(name, title, alt, _without_prolog(svg.getvalue()), png.getvalue())


def _without_prolog(svg: str) -> str:
    """Only the element: a document type names an address, which a report must not."""
    return svg[svg.index("<svg") :]


def new_figure(height_inches: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure and its axes, as of `Figure.subplots`."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def plain(axes: Axes, title: str, *, axis: Literal["x", "y"] = "y") -> None:
    """Title and grid."""
    axes.set_title(title)
    axes.grid(visible=True, axis=axis)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    *,
    labels: Sequence[str],
    spreads: Sequence[tuple[float, float] | None] | None = None,
) -> None:
    """Upright bars with their values on top, and from lowest to highest run where there are."""
    places = range(len(values))
    axes.bar(places, values, width=0.62, color=colours)
    tops = list(values)
    for place, ends in enumerate(spreads or ()):
        if ends is not None:
            low, high = ends
            value = values[place]
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(place, value, yerr=errors, color=INK, capsize=4, linewidth=1.2)
            tops[place] = max(value, high)
    for place, (top, label) in enumerate(zip(tops, labels, strict=True)):
        axes.annotate(
            label, (place, top), (0, 3), textcoords="offset points", ha="center", va="bottom"
        )
    axes.set_xticks(list(places), list(names))
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_ylim(0, (max(tops) or 1) * 1.18)


def spread(figures: Figures, path: str, name: str) -> tuple[float, float] | None:
    """Lowest and highest of a figure over a list of runs; None where there are not two."""
    try:
        values = figures.column(path, name)
    except MissingFigureError:
        return None
    return (min(values), max(values)) if len(values) > 1 else None
