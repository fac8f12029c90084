"""The replicas of a Router: where they come from, their start and end, who waits for them."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from batchcore.async_engine import AsyncEngine
from batchcore.engine import Engine
from batchcore.errors import ConfigError, EngineClosedError, EngineError
from batchcore.routing.devices import EngineBuilder
from batchcore.routing.replica import Recovery, Replica

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from batchcore.model import Model
    from batchcore.routing.link import EngineLink
    from batchcore.routing.policies import RoutingPolicy
    from batchcore.routing.prefix import PinnedPrefixes

__all__ = ["EngineSources", "ReplicaSet"]


class EngineSources:
    """Where each replica's engines come from: handed in, made by a factory, or built."""

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | None,
        devices: Sequence[str] | None,
        engines: Sequence[Engine | AsyncEngine] | None,
        engine_factory: Callable[[int], Engine] | None,
        options: dict[str, Any],
    ) -> None:
        """Take what a Router was given; nothing is loaded yet.

        Raises:
            ConfigError: It makes no sense together, or a device does not exist.
        """
        if (model is None) == (engines is None):
            raise ConfigError("a router needs either a model or engines")
        self.given: list[Engine | AsyncEngine] | None = None
        """The engines that were handed in; None where they are built."""
        self.factory = engine_factory
        """Makes another one, in a worker thread; None where that is not known how."""
        if model is not None:
            if engine_factory is not None:
                raise ConfigError("engine_factory is for engines that are handed in")
            builder = EngineBuilder(model, devices, options)
            self.factory = builder.build
            self.names = [f"{index}/{device.name}" for index, device in enumerate(builder.devices)]
            """Of the replicas."""
            return
        assert engines is not None
        if devices is not None or options:
            raise ConfigError("devices and options of engines are for replicas that are built here")
        self.given = list(engines)
        if not self.given or not all(isinstance(one, (Engine, AsyncEngine)) for one in self.given):
            raise ConfigError("engines must be a list of at least one Engine or AsyncEngine")
        if len({id(one) for one in self.given}) < len(self.given):
            raise ConfigError("an engine can't be two replicas")
        self.names = [str(index) for index in range(len(self.given))]

    async def load(self) -> list[Engine]:
        """The first engine of each replica.

        Raises:
            ModelLoadError, ConfigError, EngineError: As for `Engine`; then none is kept.
        """
        engines: list[Engine] = []
        try:
            if self.given is not None:
                for one in self.given:
                    if isinstance(one, AsyncEngine):
                        await one.start()
                    engines.append(one.engine if isinstance(one, AsyncEngine) else one)
            else:
                assert self.factory is not None
                for index in range(len(self.names)):
                    engine = await asyncio.to_thread(self.factory, index)
                    engines.append(engine)  # at once: closed below if the next one fails
            _check_alike(engines)
        except BaseException:
            if self.given is None:
                await asyncio.gather(*(asyncio.to_thread(engine.close) for engine in engines))
            raise
        return engines


class ReplicaSet:
    """All replicas, from their start to their end. On one event loop."""

    def __init__(self, sources: EngineSources, recovery: Recovery, routing: RoutingPolicy) -> None:
        """Nothing runs yet.

        Args:
            sources: Where engines come from.
            recovery: When a replica is taken out, and how it comes back.
            routing: Is told about replicas that were rebuilt.
        """
        build = sources.factory
        self.all = [
            Replica(
                index,
                name,
                recovery,
                build=None if build is None else functools.partial(build, index),
                on_change=self.wake,
                prepare=self._prepare,
            )
            for index, name in enumerate(sources.names)
        ]
        """In their order."""
        self.prefixes: list[PinnedPrefixes] = []
        """What every replica is to keep."""
        self.is_closed = False
        self._sources = sources
        self._routing = routing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Future[None] | None = None
        self._is_started = False
        self._is_paused = False
        self._waiters: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Load what is to be loaded; does nothing where that is done. See `Router.start`."""
        self.check_open()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise EngineError("this router belongs to another event loop")
        if self._is_started:
            return
        starting = self._starting or asyncio.ensure_future(self._start())
        self._starting = starting
        try:
            # Shielded: one impatient caller must not cancel the load for the others.
            await asyncio.shield(starting)
        finally:
            if starting.done():
                self._starting = None
        self.check_open()  # it may have been closed while it was loading

    async def _start(self) -> None:
        is_owned = self._sources.given is None
        for replica, engine in zip(self.all, await self._sources.load(), strict=True):
            replica.attach(engine, is_owned=is_owned)
        self._is_started = True

    async def close(self) -> None:
        """End every request, and close the engines that are the router's own."""
        self.is_closed = True
        self.wake()
        if self._starting is not None:
            # A load can't be stopped; what it gives is closed below.
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.all))
        self.wake()

    def check_open(self) -> None:
        """Refuse what comes after `close`."""
        if self.is_closed:
            raise EngineClosedError("the router is closed")

    def engines(self) -> list[Engine]:
        """Those that there are now.

        Raises:
            EngineError: Nothing is loaded yet.
        """
        if not self._is_started:
            raise EngineError("the router is not loaded yet: use 'async with' or await start()")
        return [one.link.engine for one in self.all if one.link is not None]

    def any_engine(self) -> Engine:
        """One of them, for its model.

        Raises:
            EngineError: There is none right now.
        """
        engines = self.engines()
        if not engines:
            raise EngineError("no replica is in service")
        return engines[0]

    def links_in_service(self) -> list[tuple[Replica, EngineLink]]:
        """Replicas that take requests, with their engines."""
        return [
            (one, one.link) for one in self.all if one.link is not None and one.state == "serving"
        ]

    @property
    def is_paused(self) -> bool:
        """Whether requests get no slots; replicas that come back keep to it."""
        return self._is_paused

    def pause(self) -> None:
        """Pause every engine."""
        for engine in self.engines():
            engine.pause()
        self._is_paused = True

    def resume(self) -> None:
        """Resume every engine."""
        for engine in self.engines():
            engine.resume()
        self._is_paused = False

    async def until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Look at `condition` at each `wake`; False where `timeout` passed before it was true."""

        async def wait() -> None:
            while not condition():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.add(waiter)
                try:
                    await waiter
                finally:
                    self._waiters.discard(waiter)

        try:
            await asyncio.wait_for(wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Something has changed that somebody may wait for."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _prepare(self, index: int, link: EngineLink) -> None:
        """Make an engine that has just given a token fit for service."""
        if link is not self.all[index].link:
            self._routing.forget(index)
        for prefix in list(self.prefixes):
            await prefix.put_back(index, link)
        if self._is_paused:
            link.engine.pause()


def _check_alike(engines: Sequence[Engine]) -> None:
    for engine in engines:
        if not engine.autostart:
            raise ConfigError("a router needs engines that run their own loop (autostart=True)")
        if engine.model.n_vocab != engines[0].model.n_vocab:
            raise ConfigError("the engines of a router must run the same model")
