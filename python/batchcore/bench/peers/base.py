"""What a peer is: something that is started, given one workload, and stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from batchcore.errors import BatchcoreError

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.bench.peers.workloads import Case

__all__ = ["Measurement", "Peer", "PeerError", "Setup"]


class PeerError(BatchcoreError):
    """A peer did not start, died, or did not answer as it should; the message says how."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every peer gets alike."""

    model: Path
    """The GGUF file."""
    n_threads: int
    """That compute, for prompts and for decoding."""
    num_slots: int
    """Sequences at a time."""
    n_ctx: int
    """KV cells of all of them together."""
    architecture: str = ""
    """The GGUF file's `general.architecture`."""
    keeps_prefixes: bool = False
    """Whether the workload is about prompts that start alike."""
    end_of_generation: tuple[int, ...] = ()
    """Tokens that would end a text, for peers that can't be told to ignore its end."""
    limit_s: float = 300.0
    """After which a start or a run is given up."""


@dataclass(slots=True)
class Measurement:
    """Of one run of one peer."""

    metrics: dict[str, float | None]
    """Figures by names with units; see `measure.METRICS`."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping, e.g. the command of a server."""


class Peer(Protocol):
    """Made for one run; `stop` is called whatever happens."""

    name: str
    version: str
    """Known once it was started, at the latest."""
    warms_up: bool
    """Whether a few small requests before the run mean anything to it."""

    def why_not(self, case: Case) -> str | None:
        """Why it can't run a workload at all; None where it can."""

    def start(self, setup: Setup) -> None:
        """Load the model, and return when requests can come.

        Raises:
            PeerError: It did not start.
        """

    def run(self, case: Case) -> Measurement:
        """Run a workload to its end.

        Raises:
            PeerError: It failed as a whole; requests that fail are counted instead.
        """

    def stop(self) -> None:
        """End what `start` started; never raises."""
