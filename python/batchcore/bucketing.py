"""Groups items of similar length, so that little is padded when a group runs as one rectangle.

Pure functions over lengths, with no engine behind them. All of them sort by length first, stably,
and then cut the sorted row into pieces: to minimise padding nothing else need be considered, since
swapping two items so that the longer one joins the longer rows never adds a padded token. They
differ in where they cut. A bucket counts as padded to the longest item that is in it.

The cost of each is the sort (linear for lengths below 65,536, O(n log n) above) and, where it is
more than that, what the function says. Lengths are in whatever unit the caller counts, tokens as a
rule, from 0 to 2**31 - 1. Thread-safe: nothing is shared or changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np

from batchcore.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Integers: TypeAlias = NDArray[np.int64]

__all__ = [
    "Bucket",
    "Buckets",
    "equal_count",
    "fixed_edges",
    "optimal",
    "powers_of_two",
    "token_budget",
]

T = TypeVar("T")
R = TypeVar("R")

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """Items that run together, shortest first; those of equal length in the caller's order."""

    indices: Integers
    """Where each item is in the caller's input; read-only."""
    lengths: Integers
    """Of the same items, ascending; read-only."""

    def __len__(self) -> int:
        """Rows of the rectangle, at least 1."""
        return len(self.indices)

    @property
    def longest(self) -> int:
        """Columns of the rectangle."""
        return int(self.lengths[-1])

    @property
    def real_tokens(self) -> int:
        """Sum of the lengths."""
        return int(self.lengths.sum())

    @property
    def padded_tokens(self) -> int:
        """Rows times the longest."""
        return len(self) * self.longest


@dataclass(frozen=True, eq=False)
class Buckets(Generic[T]):
    """What a strategy made of its input: buckets, shortest first, none of them empty.

    Iterating yields the items of one bucket after the other, each as a list. Everything is kept as
    four flat arrays; they are read-only.
    """

    items: Sequence[T]
    """The caller's items in the caller's order."""
    order: Integers
    """Where the j-th item of all buckets in a row is in the caller's input."""
    lengths: Integers
    """Of the items in `order`, ascending."""
    bounds: Integers
    """Bucket b has the items `order[bounds[b]:bounds[b + 1]]`; one more than there are buckets."""

    def __post_init__(self) -> None:
        """Lock the arrays."""
        for array in (self.order, self.lengths, self.bounds):
            array.setflags(write=False)

    def __len__(self) -> int:
        """Number of buckets."""
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[T]]:
        """Yield the items of each bucket."""
        for indices, _ in self._slices():
            if isinstance(self.items, np.ndarray):
                yield self.items[indices].tolist()
            else:
                yield [self.items[index] for index in indices.tolist()]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Each with the places and lengths of its items; made when first asked for."""
        return tuple(Bucket(indices, lengths) for indices, lengths in self._slices())

    @cached_property
    def inverse(self) -> Integers:
        """Where the caller's i-th item is in `order`: `results[inverse]` restores an array."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(self.order))
        places.setflags(write=False)
        return places

    @property
    def real_tokens(self) -> int:
        """Sum of all lengths."""
        return int(self.lengths.sum())

    @property
    def padded_tokens(self) -> int:
        """Sum over the buckets of rows times the longest."""
        return int(np.dot(np.diff(self.bounds), self.lengths[self.bounds[1:] - 1]))

    def restore(self, results: Iterable[Sequence[R]]) -> list[R]:
        """Bring results, one sequence per bucket, into the order of the caller's items.

        Raises:
            ConfigError: There are not as many results as items, in all or in one bucket.
        """
        parts = list(results)
        sizes = np.diff(self.bounds).tolist()
        if list(map(len, parts)) != sizes:
            raise ConfigError(
                f"{len(parts)} sequences of results don't fit the sizes of {len(sizes)} buckets"
            )
        return self.restore_flat(result for part in parts for result in part)

    def restore_flat(self, results: Iterable[R]) -> list[R]:
        """Bring results, one per item and bucket after bucket, into the caller's order.

        Raises:
            ConfigError: There are not as many results as items.
        """
        flat = list(results)
        if len(flat) != len(self.order):
            raise ConfigError(f"{len(flat)} results don't fit {len(self.order)} items")
        return [flat[place] for place in self.inverse.tolist()]

    def _slices(self) -> Iterator[tuple[Integers, Integers]]:
        ends = self.bounds.tolist()
        for start, end in pairwise(ends):
            yield self.order[start:end], self.lengths[start:end]


def equal_count(
    items: Iterable[T], num_buckets: int, *, key: Callable[[T], int] | None = None
) -> Buckets[T]:
    """Cut into `num_buckets` whose sizes differ by at most one, the larger ones first.

    With fewer items than buckets, each item has a bucket of its own.

    Args:
        items: To group; integers are lengths themselves, and an array of them is fastest.
        num_buckets: At least 1.
        key: Gives an item's length; None takes `len()`, and integers as they are.

    Raises:
        ConfigError: `num_buckets` is not an integer of 1 or more.
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    count = check_integer("num_buckets", num_buckets)

    def cut(lengths: Integers) -> Integers:
        size, extra = divmod(len(lengths), min(count, max(1, len(lengths))))
        places = np.arange(min(count, len(lengths)))
        return places * size + np.minimum(places, extra)

    return _group(items, key, cut)


def fixed_edges(
    items: Iterable[T], edges: Iterable[int], *, key: Callable[[T], int] | None = None
) -> Buckets[T]:
    """Cut at lengths that are said: a bucket for each edge, and one for what is longer than all.

    Args:
        items: To group, as in `equal_count`.
        edges: The longest length that each bucket takes, ascending; buckets without items are
            left out.
        key: As in `equal_count`.

    Raises:
        ConfigError: `edges` are none, not integers of 0 or more, or not strictly ascending.
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    uppers = [check_integer("edges", edge, low=0) for edge in edges]
    if not uppers or any(a >= b for a, b in pairwise(uppers)):
        raise ConfigError(f"edges must be strictly ascending, at least one, not {uppers}")
    array = np.array([min(upper, _MAX_INT32) for upper in uppers], np.int64)
    return _group(items, key, lambda lengths: np.searchsorted(lengths, array, "right"))


def powers_of_two(items: Iterable[T], *, key: Callable[[T], int] | None = None) -> Buckets[T]:
    """Cut at 1, 2, 4, 8 and so on, so that less than half of a bucket is padding.

    Needs no knowledge of the lengths that will come. Lengths 0 and 1 share the first bucket, the
    only one that can waste more.

    Raises:
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    return fixed_edges(items, (2**exponent for exponent in range(32)), key=key)


def token_budget(
    items: Iterable[T], budget: int, *, key: Callable[[T], int] | None = None
) -> Buckets[T]:
    """Fill buckets from the longest item down, as long as rows times the longest is in `budget`.

    An item longer than the budget gets a bucket of its own. No other way of cutting the sorted row
    within the budget has fewer buckets. The rule is CTranslate2's for `batch_type="tokens"`. Takes
    one step of Python per bucket.

    Args:
        items: To group, as in `equal_count`.
        budget: Padded tokens per bucket, at least 1.
        key: As in `equal_count`.

    Raises:
        ConfigError: `budget` is not an integer of 1 or more.
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    limit = check_integer("budget", budget)

    def cut(lengths: Integers) -> Integers:
        values = lengths.tolist()
        starts = []
        end = len(values)
        while end > 0:
            longest = values[end - 1]
            end = max(0, end - max(1, limit // longest)) if longest else 0
            starts.append(end)
        return np.array(starts, np.int64)

    return _group(items, key, cut)


def optimal(
    items: Iterable[T], num_buckets: int, *, key: Callable[[T], int] | None = None
) -> Buckets[T]:
    """Cut into at most `num_buckets` so that no other way of grouping has fewer padded tokens.

    Dynamic programming over the m distinct lengths, which a million prompts have a few thousand of:
    O(k m log m) for k buckets, in numpy, with 8 bytes of memory for each of the k m states. Equal
    lengths are never parted, so there are at most m buckets, and m of them waste nothing.

    Raises:
        ConfigError: `num_buckets` is not an integer of 1 or more.
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    count = check_integer("num_buckets", num_buckets)

    def cut(lengths: Integers) -> Integers:
        starts = np.flatnonzero(np.diff(lengths, prepend=-1))
        if count >= len(starts):
            return starts
        before = np.append(starts, len(lengths))
        return before[_optimal_cuts(lengths[starts], before, count)]

    return _group(items, key, cut)


def _optimal_cuts(distinct: Integers, before: Integers, count: int) -> list[int]:
    """First distinct length of each bucket, where `before[i]` items are shorter than the i-th."""
    # costs[p]: the fewest padded tokens of the p shortest distinct lengths, in `layer` buckets.
    costs = np.append(0, distinct * before[1:])
    choices = []
    for _ in range(2, count):
        choice = _last_bucket_starts(costs, before, distinct)
        costs = np.append(0, costs[choice] + distinct * (before[1:] - before[choice]))
        choices.append(choice)
    # The last layer is asked for all the lengths only.
    place = int(np.argmin(costs - distinct[-1] * before)) if count > 1 else 0
    cuts = [place]
    for choice in reversed(choices):
        place = int(choice[place - 1]) if place else 0
        cuts.append(place)
    return cuts


def _last_bucket_starts(costs: Integers, before: Integers, distinct: Integers) -> Integers:
    """For each prefix p, the i that minimises costs[i] + distinct[p-1] * (before[p] - before[i]).

    As a matrix over (p, i) this is totally monotone, for `distinct` and `before` both ascend. So
    the first minimum moves right with p: those of every second row bound the rows in between. All
    rows of one level are searched at once.
    """
    num = len(distinct)
    found = np.zeros(num + 2, np.int64)
    found[num + 1] = num
    step = 1 << (num.bit_length() - 1)
    while step:
        rows = np.arange(step, num + 1, 2 * step)
        low = found[rows - step]
        # Beyond i = p nothing is won: the items in between only get longer than they need be.
        widths = np.minimum(found[np.minimum(rows + step, num + 1)], rows) - low + 1
        firsts = np.cumsum(widths) - widths
        places = np.arange(int(widths.sum())) + np.repeat(low - firsts, widths)
        values = costs[places] - np.repeat(distinct[rows - 1], widths) * before[places]
        least = np.repeat(np.minimum.reduceat(values, firsts), widths)
        hits = np.flatnonzero(values == least)
        found[rows] = places[hits[np.searchsorted(hits, firsts)]]
        step //= 2
    return found[1:-1]


def _group(
    items: Iterable[T],
    key: Callable[[T], int] | None,
    cut: Callable[[Integers], NDArray[np.integer[Any]] | list[int]],
) -> Buckets[T]:
    kept, lengths = _measure(items, key)
    # numpy's stable sort is a radix sort for 16 bits only: 4 times as fast on 1,000,000 lengths.
    narrow = len(lengths) > 0 and int(lengths.max()) < 2**16
    order = np.argsort(lengths.astype(np.uint16) if narrow else lengths, kind="stable")
    ascending = lengths[order]
    bounds = np.unique(np.concatenate(([0], cut(ascending), [len(order)])).astype(np.int64))
    return Buckets(kept, order.astype(np.int64, copy=False), ascending, bounds)


def check_integer(name: str, value: object, *, low: int = 1) -> int:
    """Return `value` as an int, or raise ConfigError where it is none or below `low`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, not {value}")
    return int(value)


def as_lengths(values: Iterable[int]) -> Integers:
    """Make an array of its own of lengths, which must be integers themselves.

    Raises:
        InvalidRequestError: A length is not an integer from 0 to 2**31 - 1.
    """
    if _is_integer_array(values):
        lengths = np.asarray(values)
    else:
        row = list(values)
        for kind in set(map(type, row)):
            if issubclass(kind, bool) or not issubclass(kind, (int, np.integer)):
                wrong = next(value for value in row if type(value) is kind)
                raise InvalidRequestError(f"a length must be an integer, not {wrong!r}")
        try:
            lengths = np.fromiter(row, np.int64, len(row))
        except OverflowError as error:
            raise InvalidRequestError(f"a length is not 0 to {_MAX_INT32}") from error
    if len(lengths) and not (int(lengths.min()) >= 0 and int(lengths.max()) <= _MAX_INT32):
        place = int(np.flatnonzero((lengths < 0) | (lengths > _MAX_INT32))[0])
        raise InvalidRequestError(
            f"a length must be 0 to {_MAX_INT32}, not {lengths[place]} (item {place})"
        )
    return lengths.astype(np.int64)


def _measure(
    items: Iterable[T], key: Callable[[T], int] | None
) -> tuple[Sequence[T], NDArray[np.int64]]:
    """Keep the items, and return them with their lengths."""
    if key is None and _is_integer_array(items):
        lengths = as_lengths(items)  # type: ignore[arg-type]
        lengths.setflags(write=False)
        kept: Any = lengths
        return kept, lengths
    rows = tuple(items)
    if key is not None:
        return rows, as_lengths(map(key, rows))
    sized = {kind for kind in set(map(type, rows)) if issubclass(kind, Sized)}
    values: Any = [len(row) if type(row) in sized else row for row in rows]  # type: ignore[arg-type]
    return rows, as_lengths(values)


def _is_integer_array(values: object) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu"
