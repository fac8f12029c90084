"""What peers that are HTTP servers share: a process, a port, a health check, a client."""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import Measurement, Peer, PeerError, Setup
from batchcore.bench.peers.http_client import drive_http, free_port, wait_until_healthy
from batchcore.bench.peers.measure import measure
from batchcore.bench.peers.process import Program

if TYPE_CHECKING:
    from batchcore.bench.peers.http_client import Dialect
    from batchcore.bench.peers.workloads import Case

__all__ = ["HttpServer"]


class HttpServer(Peer, ABC):
    """A server process, driven over the loopback interface. It is stopped by its own id."""

    warms_up = True
    health: str
    """Path that answers with status 200 once the model is loaded."""

    def __init__(self, name: str, version: str) -> None:
        """Take what it is called."""
        self.name = name
        self.version = version
        self._program: Program | None = None
        self._setup: Setup | None = None
        self._url = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @abstractmethod
    def command(self, setup: Setup, port: int, folder: Path) -> list[str]:
        """Program and arguments; `folder` is for files that they name."""

    @abstractmethod
    def dialect(self, setup: Setup) -> Dialect:
        """How it is asked, and answers."""

    def why_not(self, case: Case) -> str | None:
        """Servers run all of them."""
        del case
        return None

    def start(self, setup: Setup) -> None:
        """Start the server and wait until it is healthy."""
        port = free_port()
        self._setup = setup
        self._url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory()
        self._program = Program(self.command(setup, port, Path(self._folder.name)))
        wait_until_healthy(self._program, f"{self._url}{self.health}", setup.limit_s)

    def run(self, case: Case) -> Measurement:
        """Stream every request."""
        assert self._program is not None
        assert self._setup is not None
        before_s = time.process_time()
        result = drive_http(self._url, self.dialect(self._setup), case, self._setup.limit_s)
        if not self._program.is_running:
            raise self._program.failure("the server died")
        try:
            found = measure(result, case, self._program.peak_rss_bytes())
        except PeerError as error:
            raise self._program.failure(str(error)) from None
        # What driving a server takes from it, where both share the cores.
        found.details["client_cpu_s"] = time.process_time() - before_s
        found.details["command"] = list(self._program.command[1:])
        return found

    def stop(self) -> None:
        """End the server."""
        if self._program is not None:
            self._program.stop()
        if self._folder is not None:
            self._folder.cleanup()
