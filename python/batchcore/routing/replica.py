"""A place in a Router: an engine, how it fares, and how it is brought back when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from batchcore.errors import DecodeError, EngineClosedError, EngineError, QueueFullError
from batchcore.params import SamplingParams
from batchcore.routing.link import EngineLink
from batchcore.submission import Submission

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from batchcore.engine import Engine
    from batchcore.routing.link import Attempt, Update
    from batchcore.routing.policies import ReplicaLoad
    from batchcore.stats import EngineStats

__all__ = ["Recovery", "Replica", "ReplicaState", "ReplicaStatus"]

_logger = logging.getLogger("batchcore")

ReplicaState: TypeAlias = Literal["loading", "serving", "recovering", "closed"]

# A replica that can't give one token in this time is not of use to anybody.
_PROBE_TIMEOUT_S = 60.0
_FIRST_OF_ALL = -(2**31)
_ADDED_UP = ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens", "num_preemptions")


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica of a Router, now."""

    name: str
    """Its index and device, or its index alone where the engine was handed in."""
    state: ReplicaState
    """`loading` before the start, `serving`, `recovering` while it is out of service and brought
    back, `closed` where that can't be done."""
    outstanding_tokens: int
    """Tokens that the router's requests on it still need; see `ReplicaLoad`."""
    outstanding_requests: int
    """Those requests."""
    failures: int
    """Requests that failed through its fault, since the start."""
    consecutive_failures: int
    """Those since the last one that succeeded."""
    rebuilds: int
    """Engines that it got after the first one."""
    last_error: str | None
    """What took it out of service, or kept it there, last."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """When a replica is taken out of service, and how it is brought back."""

    max_failures: int
    """Failures in a row that take it out."""
    backoff_s: float
    """Seconds until the first try to bring it back; doubled with each, until a request succeeds."""
    max_backoff_s: float
    """Where doubling ends."""


class Replica:
    """Holds an engine, or builds one. Used on the router's event loop only.

    An engine that still runs is probed with a request for one token. Where that fails, or the
    engine is closed, a new one is built, if it is known how.
    """

    def __init__(
        self,
        index: int,
        name: str,
        recovery: Recovery,
        *,
        build: Callable[[], Engine] | None,
        on_change: Callable[[], None],
        prepare: Callable[[int, EngineLink], Awaitable[None]],
    ) -> None:
        """Without an engine yet: `attach` one.

        Args:
            index: Its place in the router.
            name: For people.
            recovery: When it is taken out, and how it comes back.
            build: Makes an engine in a worker thread; None where it can't be replaced.
            on_change: Called when its state has changed or its queue has got room.
            prepare: Awaited with the engine that is about to be put (back) into service.
        """
        self.index = index
        self.name = name
        self.state: ReplicaState = "loading"
        self.link: EngineLink | None = None
        self.is_owned = False
        """Whether the engine is closed with the router."""
        self.past = dict.fromkeys(_ADDED_UP, 0)
        """Counters of the engines before."""
        self._recovery = recovery
        self._build = build
        self._on_change = on_change
        self._prepare = prepare
        self._failures = self._consecutive = self._rebuilds = 0
        self._backoff_s = recovery.backoff_s
        self._last_error: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> ReplicaStatus:
        """How it fares."""
        load = self.link.load if self.link is not None else None
        return ReplicaStatus(
            self.name,
            self.state,
            load.outstanding_tokens if load else 0,
            load.outstanding_requests if load else 0,
            self._failures,
            self._consecutive,
            self._rebuilds,
            self._last_error,
        )

    @property
    def load(self) -> ReplicaLoad | None:
        """For routing; None where it takes no requests."""
        return self.link.load if self.link is not None and self.state == "serving" else None

    def attach(self, engine: Engine, *, is_owned: bool) -> None:
        """Put its first engine into service."""
        self.link = EngineLink(engine, self._on_change)
        self.is_owned = is_owned
        self.state = "serving"

    def submit(
        self,
        submission: Submission,
        on_update: Callable[[Update, bool], None],
        *,
        streams: bool,
        num_cached_tokens: int,
    ) -> Attempt:
        """Queue a request. Updates are passed on together with whether the engine is at fault.

        Raises:
            InvalidRequestError, QueueFullError, EngineClosedError: As `Engine.submit`; after the
                last, the replica is out of service.
        """
        link = self.link
        assert link is not None
        try:
            return link.submit(
                submission,
                lambda update: on_update(update, update[1] and self._judge(link, update)),
                streams=streams,
                num_cached_tokens=num_cached_tokens,
            )
        except EngineClosedError as error:
            self._refused(error)
            raise

    def has_room(self, user: str, num_tokens: int) -> bool | None:
        """Whether its queue has room; None where it takes no requests, now or any more."""
        assert self.link is not None
        try:
            return self.link.has_room(user, num_tokens)
        except EngineClosedError as error:
            self._refused(error)
            return None

    def _refused(self, error: EngineClosedError) -> None:
        """The engine takes no requests: it is closed, or somebody drains it, which passes."""
        if self.link is not None and not self.link.is_draining:
            self._take_out(error)

    def _judge(self, link: EngineLink, update: Update) -> bool:
        """Whether a request that has ended did so through the fault of its engine."""
        deltas, _, error, _ = update
        if error is None:
            if link is self.link and any(delta[4] in ("stop", "length") for delta in deltas):
                self._consecutive = 0
                self._backoff_s = self._recovery.backoff_s
            return False
        is_closed = isinstance(error, EngineClosedError) or _is_closed(link)
        if not is_closed and not isinstance(error, DecodeError):
            return False  # e.g. no token that could be chosen: the request's own affair
        self._failures += 1
        if link is self.link:
            self._consecutive += 1
            if is_closed or self._consecutive >= self._recovery.max_failures:
                self._take_out(error)
        return True

    def _take_out(self, error: BaseException) -> None:
        if self.state != "serving":
            return
        _logger.warning("replica %s is taken out of service: %s", self.name, error)
        self._last_error = str(error)
        self.state = "recovering"
        self._task = asyncio.ensure_future(self._recover())
        self._on_change()

    async def _recover(self) -> None:
        while self.state == "recovering":
            delay = self._backoff_s
            self._backoff_s = min(2 * delay, self._recovery.max_backoff_s)
            await asyncio.sleep(delay)
            try:
                await self._bring_back()
            except Exception as error:  # whatever a factory or a device comes up with
                self._last_error = str(error)
                _logger.warning(
                    "replica %s stays out of service for %.3g s more: %s",
                    self.name,
                    self._backoff_s,
                    error,
                )
        self._on_change()

    async def _bring_back(self) -> None:
        link = self.link
        if link is not None:
            try:
                await self._probe(link)
            except QueueFullError:
                raise  # too busy to tell
            except Exception as error:
                if link.is_draining:
                    raise
                if self._build is None:
                    if not isinstance(error, EngineClosedError):
                        raise
                    self.state = "closed"
                    _logger.warning("replica %s is closed for good", self.name)
                    return
            else:
                self._back_in_service()
                return
            await self._let_go(link)
            del link  # its KV memory must be free before the next engine takes some
        await self._rebuild()
        self._back_in_service()

    def _back_in_service(self) -> None:
        self._consecutive = 0
        self.state = "serving"
        _logger.info("replica %s is back in service", self.name)

    async def _probe(self, link: EngineLink) -> None:
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        await link.run(Submission([0], params, _FIRST_OF_ALL, timeout=_PROBE_TIMEOUT_S))
        await self._prepare(self.index, link)

    async def _let_go(self, link: EngineLink) -> None:
        """Close an engine that is of no use any more; what it still ran fails, and moves on."""
        await asyncio.to_thread(link.engine.close)
        await link.detach()
        for name, value in counters_of(link.engine.stats()).items():
            self.past[name] += value
        self.link = None

    async def _rebuild(self) -> None:
        assert self._build is not None
        building = asyncio.ensure_future(asyncio.to_thread(self._build))
        try:
            engine = await asyncio.shield(building)
        except asyncio.CancelledError:
            # A load can't be stopped; what it gives must not stay behind.
            with contextlib.suppress(Exception):
                await asyncio.to_thread((await building).close)
            raise
        link = EngineLink(engine, self._on_change)
        try:
            await self._probe(link)
        except BaseException:
            await asyncio.to_thread(engine.close)
            await link.detach()
            raise
        self.link = link
        self.is_owned = True
        self._rebuilds += 1

    async def close(self) -> None:
        """Stop recovering, and end what is in flight; the engine is closed where it is owned."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.state = "closed"
        if self.link is not None:
            if self.is_owned:
                await asyncio.to_thread(self.link.engine.close)
            else:
                self.link.abort_all()
            await self.link.detach()


def counters_of(stats: EngineStats) -> dict[str, int]:
    """What is added up over the engines that a replica has had."""
    return {name: getattr(stats, name) for name in _ADDED_UP}


def _is_closed(link: EngineLink) -> bool:
    try:
        link.engine._native.has_room(b"", 0, 0)
    except EngineClosedError:
        return not link.is_draining
    except EngineError:
        pass
    return False
