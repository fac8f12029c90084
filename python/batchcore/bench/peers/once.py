"""Programs of llama.cpp that run one workload to their end and print figures of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from batchcore.bench.peers.base import Measurement, Peer, Setup
from batchcore.bench.peers.llama_server import program_version
from batchcore.bench.peers.process import run_to_end

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.bench.peers.workloads import Case

__all__ = ["RunsOnce"]


class RunsOnce(Peer):
    """Nothing is left running between runs."""

    program: ClassVar[str]
    """Its file, and the name of the peer."""
    warms_up = False

    def __init__(self, path: Path) -> None:
        """Take the program."""
        self.name = self.program
        self.version = program_version(path)
        self._path = path
        self._setup: Setup | None = None

    def arguments(self, setup: Setup, case: Case) -> list[str]:
        """Those of the workload; model, cells and threads are the same for all."""
        raise NotImplementedError

    def figures(self, text: str, case: Case) -> dict[str, float | None]:
        """Read what it printed.

        Raises:
            PeerError: The figures are not there.
        """
        raise NotImplementedError

    def start(self, setup: Setup) -> None:
        """Nothing to start."""
        self._setup = setup

    def run(self, case: Case) -> Measurement:
        """Run it to its end."""
        setup = self._setup
        assert setup is not None
        threads = str(setup.n_threads)
        command = [str(self._path), "-m", str(setup.model), "-c", str(setup.n_ctx)]
        command += ["-t", threads, "-tb", threads, *self.arguments(setup, case)]
        text, kept = run_to_end(command, setup.limit_s)
        return Measurement(self.figures(text, case) | kept, {"command": command[1:]})

    def stop(self) -> None:
        """Nothing is left."""
