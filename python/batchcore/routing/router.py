"""Several engines as one."""

from __future__ import annotations

import asyncio
import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any, Literal, cast

from batchcore.engine_options import check_not_negative, check_positive
from batchcore.errors import ConfigError, EngineClosedError, EngineError
from batchcore.params import SamplingParams
from batchcore.policy import check_timeout, check_user
from batchcore.routing.dispatch import Dispatcher
from batchcore.routing.policies import policy_of
from batchcore.routing.prefix import PinnedPrefixes
from batchcore.routing.replica import Recovery
from batchcore.routing.replica_set import EngineSources, ReplicaSet
from batchcore.routing.routed_request import RoutedRequest, RouterHandle
from batchcore.routing.stats import RouterStats
from batchcore.submission import Submission

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Sequence

    from typing_extensions import Self

    from batchcore.async_engine import AsyncEngine
    from batchcore.engine import Engine
    from batchcore.handle import Observer
    from batchcore.model import Model
    from batchcore.outputs import RequestOutput, StreamDelta
    from batchcore.routing.policies import RoutingPolicy
    from batchcore.routing.replica import ReplicaStatus
    from batchcore.submission import AdmissionHook, Prompt

__all__ = ["Router"]

# Texts longer than this are tokenised in a worker thread, so that they don't hold up the loop.
_LONG_TEXT = 16_384


class Router:
    """Spreads requests over replicas of a model, with the methods of `AsyncEngine`.

    An async context manager. Belongs to the event loop that first uses it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | None = None,
        devices: Sequence[str] | None = None,
        *,
        engines: Sequence[Engine | AsyncEngine] | None = None,
        engine_factory: Callable[[int], Engine] | None = None,
        routing: RoutingPolicy | Literal["prefix", "least_outstanding", "round_robin"] = "prefix",
        on_submit: AdmissionHook | None = None,
        max_attempts: int = 3,
        max_failures: int = 3,
        backoff_s: float = 0.5,
        max_backoff_s: float = 60.0,
        **options: Any,
    ) -> None:
        """Say what to run; loading starts with `async with`, `start` or the first request.

        Args:
            model: As for `Engine`, for replicas that are built here. Those of one device share its
                weights.
            devices: Where they run, one name per replica: `cpu`, `cuda:0`, or a name from
                `batchcore info`. None means one on every GPU, or one on the CPU where there is no
                GPU. Replicas on the CPU share out the usable cores, unless `n_threads` is given.
            engines: Engines to use in place of those, of the same model; they stay open when the
                router is closed.
            engine_factory: With `engines`: makes a new one for the replica of that index, in a
                worker thread. The one that it replaces is closed.
            routing: Which replica gets a request; see `batchcore.routing`.
            on_submit: Called once with every `Submission` before it is queued, to change or refuse
                it.
            max_attempts: Replicas that a request is tried on at most.
            max_failures: Failed requests in a row that take a replica out of service.
            backoff_s: Seconds until the first try to bring it back; doubled with each try,
            max_backoff_s: up to this.
            **options: As for `Engine`, for replicas that are built here.

        Raises:
            ConfigError: A value can't work, or a device does not exist.
        """
        check_positive(max_attempts=max_attempts, max_failures=max_failures)
        if not 0 < backoff_s <= max_backoff_s < math.inf:
            raise ConfigError("backoff_s must be above 0, and at most max_backoff_s")
        self.routing: RoutingPolicy = policy_of(routing)
        """Which replica gets a request."""
        self.on_submit = on_submit
        """Called with every request before it is queued; may be set at any time."""
        self._replicas = ReplicaSet(
            EngineSources(model, devices, engines, engine_factory, options),
            Recovery(max_failures, backoff_s, max_backoff_s),
            self.routing,
        )
        self._dispatcher = Dispatcher(
            self._replicas.all, self.routing, max_attempts, self._replicas.wake
        )
        self._observers: tuple[Observer, ...] = ()
        self._is_draining = False
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        """Load what is to be built, without blocking the event loop."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    @property
    def model(self) -> Model:
        """The model that the replicas run, once it is loaded.

        Raises:
            EngineError: It is not loaded yet, or no replica has an engine.
        """
        return self._replicas.any_engine().model

    @property
    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """How each replica fares, in their order."""
        return tuple(replica.status for replica in self._replicas.all)

    async def start(self) -> None:
        """Build the replicas in worker threads. Does nothing where they are there.

        Raises:
            ModelLoadError, ConfigError, EngineError: As for `Engine`; then none is kept.
        """
        await self._replicas.start()

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
        """Complete one prompt; cancelling the task cancels the request wherever it runs.

        Takes and raises what `Engine.generate` does. A failure of a replica is only raised where no
        other can take the request.
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

        Closing the iterator or cancelling the task cancels the request. Once something was yielded,
        a failure of its replica is raised.
        """
        handle = await self._submit(
            prompt, params, priority, user, timeout, queue_timeout, streams=True
        )
        try:
            async for delta in handle:
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
    ) -> RouterHandle:
        """Queue one prompt and return its handle, to await or to iterate.

        A handle that is dropped cancels its request.

        Raises:
            InvalidRequestError: The prompt or a parameter can't be served.
            QueueFullError: No replica has room; `retry_after_s` is the shortest that one gave.
            EngineClosedError: The router, or every replica, is closed or drained.
            EngineError: No replica is in service right now.
        """
        return await self._submit(
            prompt, params, priority, user, timeout, queue_timeout, streams=True
        )

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int | str,
        user: str,
        timeout: float | None,
        queue_timeout: float | None,
        *,
        streams: bool,
    ) -> RouterHandle:
        await self.start()
        tokens = await self._tokenize(prompt)
        self._check_accepting()
        submission = Submission(
            tokens, params or SamplingParams(), priority, user, timeout, queue_timeout
        )
        if self.on_submit is not None:
            submission = self.on_submit(submission) or submission
        request = RoutedRequest(next(self._ids), submission, streams=streams)
        self._dispatcher.submit(request)
        # What a handle needs of its engine and channel is what the router and the request offer.
        handle = RouterHandle(cast("Engine", self), cast("Any", request), submission)
        request.handle = weakref.ref(handle)
        return handle

    async def _tokenize(self, prompt: Prompt) -> list[int]:
        engine = self._replicas.any_engine()
        if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
            return await asyncio.to_thread(engine.tokenize, prompt)
        return engine.tokenize(prompt)

    async def warm(self, prompt: Prompt) -> PinnedPrefixes:
        """Compute a prompt on every replica and keep it there; see `Engine.warm`.

        A replica that is brought back later computes it again before it serves.

        Raises:
            InvalidRequestError: As `Engine.warm`; then no replica keeps it.
            EngineError: No replica could compute it.
        """
        await self.start()
        tokens = await self._tokenize(prompt)
        self._check_accepting()
        prefix = PinnedPrefixes(tokens, self._replicas.prefixes.remove)
        self._replicas.prefixes.append(prefix)
        try:
            await self._put_on_all(prefix)
        except BaseException:
            prefix.release()
            raise
        return prefix

    async def _put_on_all(self, prefix: PinnedPrefixes) -> None:
        links = self._replicas.links_in_service()
        if not links:
            raise EngineError("no replica is in service")
        results = await asyncio.gather(
            *(prefix.put_on(replica.index, link) for replica, link in links),
            return_exceptions=True,
        )
        failures = [result for result in results if result is not None]
        for error in failures:
            # A replica that is lost meanwhile gets it when it comes back.
            if not isinstance(error, EngineError) or len(failures) == len(links):
                raise error

    def pause(self) -> None:
        """Give no slot to requests that wait, until `resume`; see `Engine.pause`."""
        self._replicas.pause()

    def resume(self) -> None:
        """End `pause` and `drain`."""
        self._replicas.resume()
        self._is_draining = False

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that there are; False where `timeout` passed.

        From then on, until `resume`, what is submitted is refused with EngineClosedError. What a
        replica fails meanwhile still moves to another. Paused replicas are resumed.
        """
        check_timeout("timeout", timeout)
        self._replicas.check_open()
        if self._replicas.is_paused:
            self._replicas.resume()
        self._is_draining = True
        self._replicas.wake()  # whoever waits for capacity waits in vain
        return await self._replicas.until(lambda: not self._dispatcher.open, timeout)

    async def wait_for_capacity(
        self, num_tokens: int = 0, *, user: str = "", timeout: float | None = None
    ) -> bool:
        """Wait until a replica's queue has room for a prompt of `num_tokens`.

        Several callers may wait for the same room, so `submit` may still raise QueueFullError.

        Returns:
            False where `timeout` passed.

        Raises:
            EngineClosedError: The router takes no more requests, or every replica is closed.
        """
        check_not_negative(num_tokens=num_tokens)
        check_user(user)
        check_timeout("timeout", timeout)
        await self.start()
        return await self._replicas.until(lambda: self._has_room(user, num_tokens), timeout)

    def _has_room(self, user: str, num_tokens: int) -> bool:
        self._check_accepting()
        replicas = self._replicas.all
        rooms = [one.has_room(user, num_tokens) for one in replicas if one.load is not None]
        if any(rooms):
            return True
        # Those that serve tell when they have room, and those that recover when they are back.
        if all(room is None for room in rooms) and not any(
            one.state == "recovering" for one in replicas
        ):
            raise EngineClosedError("every replica is closed or drained")
        return False

    def add_observer(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` once with the `FinishedRequest` of every request; as for `Engine`.

        Observers of the engines see nothing of requests that come through a router: an engine may
        have had only one of several attempts.
        """
        self._observers = (*self._observers, observer)

        def remove() -> None:
            self._observers = tuple(one for one in self._observers if one is not observer)

        return remove

    def abort(self, request_id: int) -> None:
        """End a request as `cancelled` within one step; nothing happens where it has ended."""
        request = self._dispatcher.open.get(request_id)
        if request is not None:
            request.cancel()

    def stats(self) -> RouterStats:
        """Counters of the router and its replicas, each replica's as of its last step."""
        return RouterStats.of(self._replicas.all, self._dispatcher)

    async def aclose(self) -> None:
        """End every request and close the engines that were built here or by `engine_factory`.

        Requests on engines that were handed in end as `cancelled`, the others with
        EngineClosedError.
        """
        self._replicas.is_closed = True
        self._dispatcher.close()
        await self._replicas.close()

    def _check_accepting(self) -> None:
        self._replicas.check_open()
        if self._is_draining:
            raise EngineClosedError("the router is being drained: it takes no more requests")
