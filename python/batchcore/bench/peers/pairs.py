"""What the rounds of a comparison bear out: medians with spread, and ratios within rounds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.bench.compare import PairedRatio, compare_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OURS", "Spread", "Table"]

OURS = "batchcore"
"""The peer that the others are compared with."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """The runs of one model, sampling and workload in a document of `Session`."""

    document: Mapping[str, Any]
    model: str
    sampling: str
    workload: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All of them, those that failed too."""
        return [
            run
            for run in self.document["runs"]
            if (run["model"], run["sampling"], run["workload"])
            == (self.model, self.sampling, self.workload)
        ]

    @property
    def peers(self) -> list[str]:
        """Who has a run: batchcore first, then the others by name."""
        names = {run["peer"] for run in self.runs}
        return sorted(names, key=lambda name: (not name.startswith(OURS), name))

    def spread(self, peer: str, metric: str) -> Spread | None:
        """A figure of a peer over the rounds that it did not fail in."""
        values = [
            value
            for run in self.runs
            if run["peer"] == peer and (value := run["metrics"].get(metric)) is not None
        ]
        if not values:
            return None
        return Spread(statistics.median(values), min(values), max(values))

    def ratio(self, peer: str, metric: str, *, ours: str = OURS) -> PairedRatio | None:
        """How many times the figure of a peer ours is, round by round.

        Only of rounds in which neither had a request that failed: what fails early looks fast. None
        where there are none.
        """
        mine, theirs = self._by_round(ours, metric), self._by_round(peer, metric)
        rounds = sorted(mine.keys() & theirs.keys())
        if not rounds:
            return None
        return compare_pairs([theirs[one] for one in rounds], [mine[one] for one in rounds])

    def best(self, peers: list[str], metric: str = "output_tokens_per_s") -> str | None:
        """Which of some peers has the highest median, of rounds without failed requests.

        None where none has any.
        """
        found = {
            peer: statistics.median(values.values())
            for peer in peers
            if (values := self._by_round(peer, metric))
        }
        return max(found, key=lambda peer: found[peer]) if found else None

    def _by_round(self, peer: str, metric: str) -> dict[int, float]:
        return {
            run["round"]: value
            for run in self.runs
            if run["peer"] == peer
            and not run["error"]
            and not run["metrics"].get("num_failed")
            and (value := run["metrics"].get(metric)) is not None
            and 0 < value < math.inf
        }
