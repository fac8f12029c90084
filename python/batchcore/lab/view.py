"""What a report says, before it has a form: sections with tables, plots and notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.lab.paths import MissingFigureError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.lab.paths import Figures

__all__ = ["NOTHING", "Column", "Section", "Table", "cell", "make_table"]

NOTHING = "-"
"""In a cell whose figure is missing."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: Sequence[bool]
    """For each column; the others are numbers."""


@dataclass(slots=True)
class Section:
    """A part of the report."""

    id: str
    title: str
    lead: str = ""
    """What was done, in a sentence."""
    missing: str = ""
    """Why there is nothing, where that is so."""
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    """Names of plots that belong here, whether they could be drawn or not."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Column:
    """How a table gets one of its columns from the figures below a path."""

    header: str
    name: str
    """Of the figure, as a path below that of the row."""
    say: Callable[[Any], str] = str


def make_table(
    figures: Figures,
    caption: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[Column],
    *,
    head: str = "",
) -> Table:
    """One row for each label and path; columns of which no row has anything are left out.

    Columns without a `say` of their own are texts.
    """
    cells = [[cell(figures, f"{path}.{c.name}", c.say) for c in columns] for _, path in rows]
    kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in cells)]
    return Table(
        caption,
        [head, *(columns[i].header for i in kept)],
        [
            [label, *(row[i] for i in kept)]
            for (label, _), row in zip(rows, cells, strict=True)
            if any(row[i] != NOTHING for i in kept)
        ],
        [True, *(columns[i].say is str for i in kept)],
    )


def cell(figures: Figures, path: str, say: Callable[[Any], str]) -> str:
    """The text of one figure."""
    try:
        value = figures.need(path) if say is str else figures.number(path)
    except MissingFigureError:
        return NOTHING
    return say(value) or NOTHING
