"""Child processes that are spoken to in JSON, one object per line."""

from __future__ import annotations

import json
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.process import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["LineProgram"]

_END = None
_POLL_S = 0.5


class LineProgram(Program):
    """A program that answers on its stdout; a thread reads, so that a wait can end in time."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it, with variables besides those of this process.

        Raises:
            PeerError: It can't be started.
        """
        super().__init__(command, pipes=True, environment=environment)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, values: dict[str, Any]) -> None:
        """Write an object.

        Raises:
            PeerError: It reads no more.
        """
        try:
            self.stdin.write(json.dumps(values).encode() + b"\n")
            self.stdin.flush()
        except (OSError, ValueError) as error:
            raise self.failure(f"it reads no more: {error}") from None

    def receive(self, limit_s: float) -> dict[str, Any]:
        """Wait for the next object.

        Raises:
            PeerError: It ended, sent none in time, or one with an `error`.
        """
        deadline = time.perf_counter() + limit_s
        while (left_s := deadline - time.perf_counter()) > 0:
            if (values := self.poll(min(left_s, _POLL_S))) is not None:
                return values
            self.peak_rss_bytes()
        raise self.failure(f"no answer after {limit_s:.0f} s")

    def poll(self, limit_s: float) -> dict[str, Any] | None:
        """The next object, or None where none comes in time.

        Raises:
            PeerError: It ended, or sent one with an `error`.
        """
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return None
        if line is _END:
            raise self.failure("it ended without an answer")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise self.failure(str(values["error"]))
        return values

    def stop(self) -> None:
        """End it, and the thread that reads."""
        super().stop()
        self._reader.join(1.0)

    def _read(self) -> None:
        try:
            for line in self.stdout:
                self._lines.put(line)
        except (OSError, ValueError):  # closed meanwhile
            pass
        self._lines.put(_END)
