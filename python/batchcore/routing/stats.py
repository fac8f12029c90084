"""Counters of a Router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchcore.routing.replica import counters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from batchcore.routing.dispatch import Dispatcher
    from batchcore.routing.replica import Replica, ReplicaStatus
    from batchcore.stats import EngineStats

__all__ = ["ReplicaStats", "RouterStats"]


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """One replica."""

    status: ReplicaStatus
    engine: EngineStats | None
    """Of the engine that it has now; None while it has none. A new engine counts from 0."""


@dataclass(frozen=True, slots=True)
class RouterStats:
    """A router and its replicas.

    Totals are given where adding up says something. Times, predictions, histograms and tiers belong
    to one engine each: see `replicas`.
    """

    replicas: tuple[ReplicaStats, ...]
    """In their order."""
    num_serving: int
    """Replicas in service."""
    num_open: int
    """Requests of this router that have not ended."""
    num_finished: dict[str, int]
    """Requests of this router by terminal state; each counts once, however often it was tried."""
    num_retries: int
    """Attempts after the first ones."""
    num_refused: int
    """Submits refused with QueueFullError, by every replica in service."""
    outstanding_tokens: int
    """Of all replicas; see `ReplicaLoad`."""
    num_running: int
    """Sequences that hold a slot, of all replicas, whoever submitted them."""
    num_waiting: int
    """Sequences in the queues, likewise."""
    num_cells: int
    """KV cells in all, likewise."""
    num_active_cells: int
    """KV cells of running sequences, likewise."""
    num_cached_cells: int
    """KV cells kept for the prefix they hold, likewise; a prefix may be on several replicas."""
    num_prompt_tokens: int
    """Prompt tokens of the requests that were admitted; with engines that were replaced, as the
    three below, and so never less than before. What a retry does again counts again."""
    num_cached_tokens: int
    """Prompt tokens that a cached prefix saved."""
    num_generated_tokens: int
    num_preemptions: int

    @classmethod
    def of(cls, replicas: Sequence[Replica], dispatcher: Dispatcher) -> Self:
        """Read and add up."""
        each = tuple(
            ReplicaStats(one.status, None if one.link is None else one.link.engine.stats())
            for one in replicas
        )
        engines = [one.engine for one in each if one.engine is not None]
        now = ("num_running", "num_waiting", "num_cells", "num_active_cells", "num_cached_cells")
        totals = {name: sum(getattr(engine, name) for engine in engines) for name in now}
        for since_the_start in (*(one.past for one in replicas), *map(counters_of, engines)):
            for name, value in since_the_start.items():
                totals[name] = totals.get(name, 0) + value
        return cls(
            replicas=each,
            num_serving=sum(one.status.state == "serving" for one in each),
            num_open=len(dispatcher.open),
            num_finished=dict(dispatcher.num_finished),
            num_retries=dispatcher.num_retries,
            num_refused=dispatcher.num_refused,
            outstanding_tokens=sum(one.status.outstanding_tokens for one in each),
            **totals,
        )
