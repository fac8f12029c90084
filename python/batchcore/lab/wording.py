"""How a report writes numbers: few digits, and always the unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["count", "listed", "percent", "points", "rate", "ratio", "seconds", "size", "span"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def count(number: float, noun: str) -> str:
    """`1 row`, `2 rows`, `12,000 rows`."""
    return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")


def seconds(value: float) -> str:
    """`850 ms`, `1.23 s`, `12.3 s`."""
    if abs(value) < 0.9995:
        return f"{digits(value * 1e3)} ms"
    return f"{digits(value)} s"


def digits(value: float) -> str:
    """Three digits that count; all of those before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    if rounded and math.floor(math.log10(abs(rounded))) > 2 - decimals:
        decimals -= 1  # 9.999 is 10.0, not 10.00
    return f"{value:,.{min(max(decimals, 0), 6)}f}"


def rate(value: float, unit: str = "tokens/s") -> str:
    """`96.1 tokens/s`."""
    return f"{digits(value)} {unit}"


def ratio(value: float) -> str:
    """`1.63x`."""
    return f"{value:.2f}x"


def percent(fraction: float) -> str:
    """`35.8%` of 0.358."""
    return f"{points(fraction * 100)}%"


def points(value: float) -> str:
    """Percentage points, with one decimal."""
    return f"{value:.1f}"


def size(num_bytes: float) -> str:
    """`512 MiB`."""
    unit = 0
    while abs(num_bytes) >= 1024 and unit < len(_UNITS) - 1:
        num_bytes /= 1024
        unit += 1
    return f"{num_bytes:.0f} B" if unit == 0 else f"{digits(num_bytes)} {_UNITS[unit]}"


def span(values: Sequence[str]) -> str:
    """`2.25x to 2.40x`, or only one of the two where they read the same."""
    low, high = values
    return low if low == high else f"{low} to {high}"


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
