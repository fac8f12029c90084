"""Programs that peers run: started with their output in a file, watched, ended by their own id."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.base import PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

__all__ = ["Program", "run_to_end", "tail_of"]

_GRACE_S = 10.0
_TAIL_LINES = 12
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


class Program:
    """A child process whose log goes to a file that is deleted with it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        pipes: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            command: Program and arguments.
            pipes: Whether its stdin and stdout are pipes; otherwise stdout goes to the log.
            environment: Variables that it gets besides those of this process.

        Raises:
            PeerError: It can't be started.
        """
        self.command = tuple(command)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._peak_rss_bytes: int | None = None
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else self._log,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"can't start {command[0]}: {error.strerror}") from error

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def stdin(self) -> IO[bytes]:
        """Of a program with pipes."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Of a program with pipes."""
        assert self._process.stdout is not None
        return self._process.stdout

    def wait(self, limit_s: float) -> int:
        """Wait for its end, and give its exit status.

        Raises:
            PeerError: It takes longer than that; it goes on.
        """
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise PeerError(f"still running after {limit_s:.0f} s{self.say_log()}") from None

    def peak_rss_bytes(self) -> int | None:
        """Memory that was resident at most until now; None where the system doesn't say."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return self._peak_rss_bytes
        if found := _PEAK.search(status):  # a process that has ended has none any more
            self._peak_rss_bytes = int(found[1]) * 1024
        return self._peak_rss_bytes

    def failure(self, what: str) -> PeerError:
        """An error with its exit status, where it has ended, and the end of its log."""
        code = self._process.poll()
        ended = "" if code is None else f"; it ended with status {code}"
        return PeerError(f"{what}{ended}{self.say_log()}")

    def read_log(self) -> str:
        """All that it has logged."""
        # Without moving the position, which the program shares.
        file = self._log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")

    def say_log(self) -> str:
        """The end of its log, to be put behind a message."""
        tail = tail_of(self.read_log())
        return f"\n{tail}" if tail else ""

    def stop(self) -> None:
        """End it, by force where it doesn't hear."""
        if self._log.closed:
            return
        self.peak_rss_bytes()
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what it never read
                    continue
        self._log.close()


def run_to_end(command: Sequence[str], limit_s: float) -> tuple[str, dict[str, Any]]:
    """Run a program that ends by itself.

    Returns:
        What it printed, to stdout and stderr, and what to keep of the run.

    Raises:
        PeerError: It failed, or took longer.
    """
    program = Program(command)
    start = time.perf_counter()
    try:
        while program.is_running and time.perf_counter() - start < limit_s:
            program.peak_rss_bytes()
            time.sleep(0.1)
        if program.wait(1.0) != 0:
            raise program.failure("it failed")
        return program.read_log(), {"peak_rss_bytes": program.peak_rss_bytes()}
    finally:
        program.stop()


def tail_of(text: str, num_lines: int = _TAIL_LINES) -> str:
    """The last lines that are not empty."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-num_lines:])
