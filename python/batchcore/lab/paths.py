"""Figures of a lab document by their paths, so that what is said can be traced back.

A path is written as in `parts.batch_sizes.rows[3].total_s`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Figures", "MissingFigureError", "is_number", "resolve"]

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


class MissingFigureError(LookupError):
    """Raised when a document has no figure at a path. Inside of this package only."""

    def __init__(self, path: str) -> None:
        """Keep the path."""
        super().__init__(path)
        self.path = path


def resolve(document: Mapping[str, Any], path: str) -> Any:
    """What a document has at a path; None where it has nothing."""
    value: Any = document
    for name, index in _STEP.findall(path):
        if name:
            value = value.get(name) if isinstance(value, dict) else None
        else:
            is_there = isinstance(value, list) and int(index) < len(value)
            value = value[int(index)] if is_there else None
    return value


def is_number(value: Any) -> bool:
    """Whether a value can be computed with: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Figures:
    """Reads a document and keeps what was read."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Start with nothing read."""
        self._document = document
        self.used: dict[str, Any] = {}
        """Every value that was read, by its path."""

    def peek(self, path: str) -> Any:
        """A value, or None, without keeping that it was read."""
        return resolve(self._document, path)

    def length(self, path: str) -> int:
        """How many elements a list has; 0 where there is none."""
        value = self.peek(path)
        return len(value) if isinstance(value, list) else 0

    def need(self, path: str) -> Any:
        """A value of any type.

        Raises:
            MissingFigureError: There is none.
        """
        value = self.peek(path)
        if value is None:
            raise MissingFigureError(path)
        self.used[path] = value
        return value

    def text(self, path: str) -> str:
        """A text that is not empty, without the full stop at its end.

        Raises:
            MissingFigureError: There is none.
        """
        value = self.peek(path)
        if not isinstance(value, str) or not value:
            raise MissingFigureError(path)
        self.used[path] = value
        return value.rstrip(".")

    def numbers(self, path: str) -> list[float]:
        """A list of numbers, at least one.

        Raises:
            MissingFigureError: There is no such list.
        """
        values = self.peek(path)
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            raise MissingFigureError(path)
        self.used[path] = values
        return values

    def number(self, path: str) -> float:
        """A finite number.

        Raises:
            MissingFigureError: There is none.
        """
        value: float = self.peek(path)
        if not is_number(value):
            raise MissingFigureError(path)
        self.used[path] = value
        return value

    def first_number(self, *paths: str) -> float:
        """The number at the first path that has one.

        Raises:
            MissingFigureError: None has.
        """
        there = (path for path in paths if is_number(self.peek(path)))
        return self.number(next(there, paths[0]))

    def positive(self, path: str) -> float:
        """A number above 0, which may be divided by.

        Raises:
            MissingFigureError: There is none.
        """
        if not (value := self.number(path)) > 0:
            raise MissingFigureError(path)
        return value

    def column(self, path: str, name: str) -> list[float]:
        """A number of every element of a list.

        Raises:
            MissingFigureError: There is no list, it is empty, or an element has no such number.
        """
        count = self.length(path)
        if not count:
            raise MissingFigureError(path)
        return [self.number(f"{path}[{index}].{name}") for index in range(count)]

    def find(self, path: str, name: str, value: Any) -> str:
        """The path of the first element of a list that has this value under a name.

        Raises:
            MissingFigureError: None has.
        """
        for index in range(self.length(path)):
            element = f"{path}[{index}]"
            if self.peek(f"{element}.{name}") == value:
                return element
        raise MissingFigureError(path)

    def sentences(self, *makers: Callable[[Figures], str | None]) -> str:
        """One sentence of each maker that finds its figures; those of the others are not kept."""
        found = []
        for make in makers:
            figures = Figures(self._document)
            try:
                sentence = make(figures)
            except MissingFigureError:
                continue
            if sentence:
                self.used.update(figures.used)
                found.append(sentence)
        return " ".join(found)

    def first(self, *makers: Callable[[Figures], str | None]) -> str:
        """The sentence of the first maker that finds its figures; empty where none does."""
        for make in makers:
            if sentence := self.sentences(make):
                return sentence
        return ""
