"""How `Engine.generate` hands its prompts over: in which order, in which batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchcore.params import SamplingParams

__all__ = ["Bucketing", "plan_batches"]

Bucketing = (
    Literal["sorted", "equal_count", "powers_of_two", "optimal"]
    | Callable[[Sequence[int]], Sequence[Sequence[int]]]
)
"""A strategy by name, or a function from lengths to buckets of indices."""

_NUM_BUCKETS = 3


def plan_batches(
    tokens: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    batching: str,
    batch_size: int,
    bucketing: Bucketing | None,
    order: str,
) -> list[list[int]]:
    """Indices of the prompts, in the batches in which they are handed in.

    Raises:
        ConfigError: An option is unknown, or has no meaning with the others.
    """
    if batching == "continuous":
        if bucketing is not None:
            raise ConfigError("bucketing is for batching='static': continuous batches have none")
        return [_in_order(tokens, params, order)]
    if batching != "static":
        raise ConfigError(f"batching must be 'continuous' or 'static', not {batching!r}")
    if order != "given":
        raise ConfigError("order is for batching='continuous': use bucketing with 'static'")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    return cut_batches([len(prompt) for prompt in tokens], batch_size, bucketing)


def cut_batches(
    lengths: Sequence[int], batch_size: int, bucketing: Bucketing | None
) -> list[list[int]]:
    """Indices in static batches of at most `batch_size`, none of which spans two buckets."""
    return [
        list(bucket[first : first + batch_size])
        for bucket in bucketize(lengths, bucketing)
        for first in range(0, len(bucket), batch_size)
    ]


def bucketize(lengths: Sequence[int], bucketing: Bucketing | None) -> list[list[int]]:
    """Buckets of indices by length: all of them in one where `bucketing` is None."""
    everything = list(range(len(lengths)))
    if bucketing is None:
        return [everything]
    if bucketing == "sorted":
        return [sorted(everything, key=lambda index: lengths[index])]
    if callable(bucketing):
        buckets = [list(bucket) for bucket in bucketing(lengths)]
        if sorted(index for bucket in buckets for index in bucket) != everything:
            raise ConfigError("bucketing must put every index into exactly one bucket")
        return buckets
    # numpy is only needed here.
    from batchcore import bucketing as strategies  # noqa: PLC0415

    if bucketing == "powers_of_two":
        found = strategies.powers_of_two(lengths)
    elif bucketing == "equal_count":
        found = strategies.equal_count(lengths, _NUM_BUCKETS)
    elif bucketing == "optimal":
        found = strategies.optimal(lengths, _NUM_BUCKETS)
    else:
        raise ConfigError(f"there is no bucketing strategy {bucketing!r}")
    return [[int(index) for index in bucket.indices] for bucket in found.buckets]


def _in_order(
    tokens: Sequence[Sequence[int]], params: Sequence[SamplingParams], order: str
) -> list[int]:
    everything = list(range(len(tokens)))
    if order == "given":
        return everything
    if order == "longest_first":
        return sorted(everything, key=lambda i: -(len(tokens[i]) + params[i].max_tokens))
    if order == "prefix_groups":
        return sorted(everything, key=lambda i: tuple(tokens[i]))
    raise ConfigError(f"order must be 'given', 'longest_first' or 'prefix_groups', not {order!r}")


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """Something to call for each finished prompt."""
    if not shown:
        yield lambda: None
        return
    # rich is only needed here, and importing it takes long.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)
