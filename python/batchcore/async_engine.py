"""The engine for asyncio."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.engine import Engine
from batchcore.engine_options import check_not_negative
from batchcore.errors import ConfigError, EngineClosedError, EngineError
from batchcore.handle import AsyncRequestHandle
from batchcore.params import SamplingParams
from batchcore.pinned import PinnedPrefix
from batchcore.policy import check_timeout, check_user, encode_user
from batchcore.submission import Submission, submit_to

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable

    from typing_extensions import Self

    from batchcore.handle import Observer
    from batchcore.model import Model
    from batchcore.outputs import RequestOutput, StreamDelta
    from batchcore.stats import EngineStats
    from batchcore.submission import Prompt

__all__ = ["AsyncEngine"]

# Texts longer than this are tokenised in a worker thread, so that they don't hold up the loop.
_LONG_TEXT = 16_384
_ROOM_NEWS = 0  # Engine::kRoomNews


class AsyncEngine:
    """An `Engine` whose results come through an event loop. An async context manager.

    The loop is woken once per decode call, by a file descriptor, however many requests have news.
    Works with asyncio and uvloop. Belongs to the event loop that first uses it.
    """

    def __init__(self, model: str | os.PathLike[str] | Model | Engine, **options: Any) -> None:
        """Say what to run; loading starts with `async with`, `start` or the first request.

        Args:
            model: As for `Engine`; or an engine, which then stays open when this is closed.
            **options: As for `Engine`.
        """
        self._source = model
        self._options = options
        self._engine: Engine | None = model if isinstance(model, Engine) else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notifier: _core.Notifier | None = None
        self._starting: asyncio.Future[Engine] | None = None
        self._closed = False
        self._room_waiters: list[asyncio.Future[None]] = []
        self._handles: weakref.WeakValueDictionary[int, AsyncRequestHandle] = (
            weakref.WeakValueDictionary()
        )

    async def __aenter__(self) -> Self:
        """Load the model without blocking the event loop."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    @property
    def engine(self) -> Engine:
        """The engine underneath, once it is loaded.

        Raises:
            EngineError: It is not loaded yet.
        """
        if self._engine is None:
            raise EngineError("the engine is not loaded yet: use 'async with' or await start()")
        return self._engine

    async def start(self) -> None:
        """Load the model in a worker thread. Does nothing where it is loaded.

        Raises:
            ModelLoadError, ConfigError, EngineError: As for `Engine`.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise EngineError("this engine belongs to another event loop")
        if self._engine is None:
            starting = self._starting or asyncio.ensure_future(
                asyncio.to_thread(Engine, self._source, **self._options)  # type: ignore[arg-type]
            )
            self._starting = starting
            try:
                # Shielded: one impatient caller must not cancel the load for the others.
                self._engine = await asyncio.shield(starting)
            finally:
                if starting.done():
                    self._starting = None
        self._check_open()  # it may have been closed while it was loading
        if not self._engine.autostart:
            raise ConfigError(
                "an AsyncEngine needs an engine that runs its own loop (autostart=True)"
            )
        if self._notifier is None:
            self._notifier = _core.Notifier()
            loop.add_reader(self._notifier.fd, self._dispatch)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    def _dispatch(self) -> None:
        assert self._notifier is not None
        for request_id in self._notifier.take():
            if request_id == _ROOM_NEWS:
                self._wake_room_waiters()
                continue
            handle = self._handles.get(request_id)
            if handle is not None:
                handle._wake()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> RequestOutput:
        """Complete one prompt; cancelling the task cancels the request.

        Takes and raises what `Engine.generate` does.
        """
        handle = await self._submit(
            prompt, params, priority, user, timeout, queue_timeout, streams=False
        )
        return await handle

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> AsyncIterator[StreamDelta]:
        """Complete one prompt and yield text and tokens as they come.

        Closing the iterator or cancelling the task cancels the request.
        """
        handle = await self._submit(
            prompt, params, priority, user, timeout, queue_timeout, streams=True
        )
        deltas = handle.__aiter__()
        try:
            async for delta in deltas:
                yield delta
        finally:
            handle.cancel()

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> AsyncRequestHandle:
        """Queue one prompt and return its handle, to await or to iterate.

        A handle that is dropped cancels its request. Raises what `Engine.submit` does.
        """
        return await self._submit(
            prompt, params, priority, user, timeout, queue_timeout, streams=True
        )

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int | str = 0,
        user: str = "",
        timeout: float | None = None,
        queue_timeout: float | None = None,
        *,
        streams: bool,
        pins: bool = False,
    ) -> AsyncRequestHandle:
        await self.start()
        engine = self.engine
        if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
            tokens = await asyncio.to_thread(engine.tokenize, prompt)
        else:
            tokens = engine.tokenize(prompt)
        self._check_open()
        handle = submit_to(
            engine,
            [
                Submission(
                    tokens, params or SamplingParams(), priority, user, timeout, queue_timeout
                )
            ],
            AsyncRequestHandle,
            streams=streams,
            pins=pins,
            notifier=self._notifier,
        )[0]
        self._handles[handle.id] = handle
        return handle

    async def warm(self, prompt: Prompt) -> PinnedPrefix:
        """Compute a prompt and keep it for requests that start with it; see `Engine.warm`."""
        once = SamplingParams(max_tokens=1)
        handle = await self._submit(prompt, once, streams=False, pins=True)
        try:
            output = await handle
        except BaseException:
            # It may have been kept already, and nobody else knows how to let go of it.
            self.engine._native.unpin(handle.id)
            raise
        return PinnedPrefix(self.engine._native, handle.id, len(output.prompt_token_ids))

    def pause(self) -> None:
        """Give no slot to requests that wait, until `resume`; see `Engine.pause`."""
        self.engine.pause()

    def resume(self) -> None:
        """End `pause` and `drain`."""
        self.engine.resume()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that there are; see `Engine.drain`."""
        return await asyncio.to_thread(self.engine.drain, timeout)

    async def wait_for_capacity(
        self, num_tokens: int = 0, *, user: str = "", timeout: float | None = None
    ) -> bool:
        """Wait until the queue has room for a prompt of `num_tokens`; False where `timeout` passed.

        Several callers may wait for the same room, so `submit` may still raise QueueFullError.

        Raises:
            EngineClosedError: The engine takes no more requests.
        """
        check_not_negative(num_tokens=num_tokens)
        check_user(user)
        check_timeout("timeout", timeout)
        await self.start()
        try:
            await asyncio.wait_for(self._until_room(encode_user(user), num_tokens), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def _until_room(self, user: bytes, num_tokens: int) -> None:
        native = self.engine._native
        while True:
            self._check_open()
            assert self._notifier is not None
            waiter = asyncio.get_running_loop().create_future()
            self._room_waiters.append(waiter)
            # Watched first, so that room that comes between the two is not missed.
            native.watch_room(self._notifier)
            if native.has_room(user, 1, num_tokens):
                waiter.cancel()
                return
            await waiter

    def _wake_room_waiters(self) -> None:
        waiters, self._room_waiters = self._room_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def add_observer(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with every `FinishedRequest`; see `Engine.add_observer`."""
        return self.engine.add_observer(observer)

    def abort(self, request_id: int) -> None:
        """End a request as `cancelled` within one step; nothing happens where it has ended."""
        self.engine.abort(request_id)

    def stats(self) -> EngineStats:
        """A consistent copy of the counters, as of the last step."""
        return self.engine.stats()

    async def aclose(self) -> None:
        """Close the engine, unless it was handed in; see `Engine.close`."""
        self._closed = True
        if self._starting is not None:
            # A load can't be stopped; what it gives is closed below, or by nobody.
            self._engine = await asyncio.shield(self._starting)
        open_handles = [handle for handle in self._handles.values() if not handle.finished]
        if self._engine is not None and self._engine is not self._source:
            await asyncio.to_thread(self._engine.close)
        else:
            for handle in open_handles:
                handle.cancel()
            await asyncio.to_thread(_wait_for, open_handles)
        if self._notifier is not None and self._loop is not None:
            self._loop.remove_reader(self._notifier.fd)
            self._notifier = None
            self._wake_room_waiters()
            for handle in open_handles:
                handle._wake()  # for the news that came with closing


def _wait_for(handles: list[AsyncRequestHandle]) -> None:
    for handle in handles:
        while not handle._channel.is_finished:
            handle._channel.wait(1.0)
