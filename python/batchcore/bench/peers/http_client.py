"""Drives a server over HTTP with the driver that drives engines: same clock, same records."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import URLError
from urllib.request import urlopen

from batchcore.bench.load import _drive
from batchcore.bench.peers.base import PeerError
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from batchcore.bench.load import LoadResult, Serve, _Watch
    from batchcore.bench.peers.process import Program
    from batchcore.bench.peers.workloads import Case
    from batchcore.bench.workload import WorkloadRequest

__all__ = ["Dialect", "drive_http", "free_port", "import_aiohttp", "wait_until_healthy"]

_EVENT = b"data: "
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 1 << 20  # last events repeat the prompt


class Dialect(Protocol):
    """How a server is asked for a completion, and how it answers."""

    path: str
    """Of the URL."""

    def body(self, request: WorkloadRequest) -> dict[str, Any]:
        """What to post."""

    def num_tokens(self, event: dict[str, Any], so_far: int, most: int) -> int:
        """How many of `most` tokens there are after an event, and `so_far` before it."""

    def num_cached_tokens(self, event: dict[str, Any]) -> int | None:
        """Prompt tokens that a cache answered for, where an event says so."""


def import_aiohttp() -> Any:
    """The module, imported only when it is needed.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import aiohttp  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            "servers are driven with aiohttp: pip install 'batchcore[peers]'"
        ) from None
    return aiohttp


def free_port() -> int:
    """A port of the loopback interface that nobody listened at a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_healthy(program: Program, url: str, limit_s: float) -> None:
    """Wait until a server answers with status 200.

    Raises:
        PeerError: It ended before, or did not within `limit_s`.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        if not program.is_running:
            raise program.failure("the server ended while it started")
        try:
            with urlopen(url, timeout=2.0) as response:  # 503 while it loads is an error here
                if response.status == 200:
                    return
        except (URLError, OSError):
            pass
        time.sleep(0.1)
    raise program.failure(f"the server did not come up in {limit_s:.0f} s")


def drive_http(base_url: str, dialect: Dialect, case: Case, limit_s: float) -> LoadResult:
    """Run a workload against a server.

    Args:
        base_url: Scheme, host and port.
        dialect: What it understands.
        case: The workload.
        limit_s: From the start of the run; what is not done by then fails.

    Raises:
        ConfigError: aiohttp is not installed.
    """
    return _drive(
        case.workload,
        _client(f"{base_url}{dialect.path}", dialect, limit_s),
        max_concurrency=case.max_concurrency,
        group_concurrency=case.group_concurrency,
    )


@asynccontextmanager
async def _client(url: str, dialect: Dialect, limit_s: float) -> AsyncIterator[Serve]:
    aiohttp = import_aiohttp()
    # As many connections as requests: a client's pool must not be the queue that is measured. None
    # is used twice: a server may close one at the moment that a request is sent on it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    options = {"connector": connector, "timeout": timeout, "read_bufsize": _MAX_LINE_BYTES}
    async with aiohttp.ClientSession(**options) as session:

        async def serve(request: WorkloadRequest, watch: _Watch) -> None:
            left_s = max(0.0, limit_s - watch.now_s())
            try:
                await asyncio.wait_for(_complete(session, url, dialect, request, watch), left_s)
            except asyncio.TimeoutError:
                raise PeerError(f"not finished after {limit_s:.0f} s") from None
            except (aiohttp.ClientError, ValueError) as error:
                raise PeerError(f"{type(error).__name__}: {error}") from error

        yield serve


async def _complete(
    session: aiohttp.ClientSession,
    url: str,
    dialect: Dialect,
    request: WorkloadRequest,
    watch: _Watch,
) -> None:
    so_far = 0
    async with session.post(url, json=dialect.body(request)) as response:
        if response.status != 200:
            text = (await response.text())[:300]
            raise PeerError(f"status {response.status}: {text}")
        async for line in response.content:
            if not line.startswith(_EVENT):
                if line.startswith(b"error"):
                    raise PeerError(line.decode("utf-8", "replace").strip())
                continue
            data = line[len(_EVENT) :].strip()
            if data == _DONE:
                break
            event = json.loads(data)
            if "error" in event:
                raise PeerError(str(event["error"]))
            total = dialect.num_tokens(event, so_far, request.params.max_tokens)
            watch.take(0, total - so_far, watch.now_s())
            so_far = total
            cached = dialect.num_cached_tokens(event)
            if cached is not None:
                watch.num_cached_tokens = cached
    if so_far != request.params.max_tokens:
        raise PeerError(f"gave {so_far} tokens instead of {request.params.max_tokens}")
    watch.finish_reason = "length"
