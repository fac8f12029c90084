"""Requests of a Router on their way: to a replica, to another where that fails, to their end."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import TYPE_CHECKING

from batchcore.errors import EngineClosedError, EngineError, QueueFullError
from batchcore.routing.policies import PrefixAware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.routing.link import Update
    from batchcore.routing.policies import RoutingPolicy
    from batchcore.routing.replica import Replica
    from batchcore.routing.routed_request import RoutedRequest

__all__ = ["Dispatcher"]

# Requests of a lost replica that are placed anew before others on the event loop get a turn.
_RETRIES_PER_TURN = 16


class Dispatcher:
    """Places requests on replicas, and again where a replica fails. On one event loop.

    Every request that `submit` accepts reaches exactly one terminal state: by an engine's last
    update, or by this.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        routing: RoutingPolicy,
        max_attempts: int,
        on_change: Callable[[], None],
    ) -> None:
        """Take what a Router was given; `on_change` is called when the last request has ended."""
        self.open: dict[int, RoutedRequest] = {}
        """Requests that have not ended, by the router's id."""
        self.num_finished: Counter[str] = Counter()
        """Requests by terminal state."""
        self.num_retries = 0
        """Attempts after the first ones."""
        self.num_refused = 0
        """Submits that every replica's queue refused."""
        self._replicas = replicas
        self._routing = routing
        self._max_attempts = max_attempts
        self._on_change = on_change
        self._is_closed = False
        self._retries: deque[RoutedRequest] = deque()
        self._retrying: asyncio.Task[None] | None = None

    def submit(self, request: RoutedRequest) -> None:
        """Place a new request.

        Raises:
            InvalidRequestError: It can't be served.
            QueueFullError: No replica has room; of those that were asked, the first to have some.
            EngineError: No replica is in service; EngineClosedError where that won't change.
        """
        try:
            self._place(request)
        except QueueFullError:
            self.num_refused += 1
            raise
        self.open[request.id] = request

    def close(self) -> None:
        """Retry nothing any more: what fails from here on has failed."""
        self._is_closed = True
        while self._retries:
            self._retry(self._retries.popleft())

    def _place(self, request: RoutedRequest) -> bool:
        """Submit to the best replica that takes it; False where no time is left."""
        submission = request.remaining()
        if submission is None:
            return False
        prompt = submission.prompt_token_ids
        loads = [None if one.index in request.tried else one.load for one in self._replicas]
        refusals: list[QueueFullError | EngineClosedError] = []
        while any(load is not None for load in loads):
            index = self._routing.choose(prompt, loads)
            if not 0 <= index < len(loads) or loads[index] is None:
                raise EngineError(f"the routing policy chose replica {index}: it is out of service")
            replica = self._replicas[index]
            cached = (
                self._routing.num_matching_tokens(prompt, index)
                if isinstance(self._routing, PrefixAware)
                else 0
            )
            try:
                attempt = replica.submit(
                    submission,
                    lambda update, is_at_fault: self._on_update(request, update, is_at_fault),
                    streams=request.streams,
                    num_cached_tokens=cached,
                )
            except (QueueFullError, EngineClosedError) as error:
                loads[index] = None
                refusals.append(error)
                continue
            self.num_retries += request.num_attempts > 0
            request.num_attempts += 1
            request.tried.add(index)
            request.attempt = attempt
            if request.is_cancelled:  # from another thread, just now
                attempt.abort()
            self._routing.record(prompt, index)
            return True
        full = [error for error in refusals if isinstance(error, QueueFullError)]
        if full:
            raise min(full, key=lambda error: error.retry_after_s)
        if all(replica.state == "closed" for replica in self._replicas):
            raise EngineClosedError("every replica is closed")
        raise refusals[-1] if refusals else EngineError("no replica is in service")

    def _on_update(self, request: RoutedRequest, update: Update, is_at_fault: bool) -> None:
        deltas, is_finished, error, _ = update
        if not is_finished:
            request.publish(update)
            return
        request.attempt = None
        if is_at_fault and self._may_go_on(request):
            request.restart(update)
            self._retries.append(request)
            if self._retrying is None or self._retrying.done():
                self._retrying = asyncio.ensure_future(self._run_retries())
        elif is_at_fault and request.is_cancelled:
            self._end(request, "cancelled", lambda: request.end("cancelled"))
        else:
            reasons = [delta[4] for delta in deltas if delta[4] is not None]
            reason = "error" if error is not None else reasons[-1] if reasons else "stop"
            self._end(request, reason, lambda: request.publish(update))

    def _may_go_on(self, request: RoutedRequest) -> bool:
        return not (
            self._is_closed
            or request.is_read
            or request.is_cancelled
            or request.num_attempts >= self._max_attempts
        )

    async def _run_retries(self) -> None:
        done = 0
        while self._retries:
            self._retry(self._retries.popleft())
            done += 1
            if done % _RETRIES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _retry(self, request: RoutedRequest) -> None:
        failure = request.error
        if request.is_cancelled:
            self._end(request, "cancelled", lambda: request.end("cancelled"))
            return
        if not self._is_closed:
            try:
                if not self._place(request):
                    self._end(request, "timeout", lambda: request.end("timeout"))
                return
            except EngineError:
                pass  # no other replica: what failed it first says more
            except Exception as error:  # a queue that is full, a policy that is broken
                error.__cause__ = failure
                failure = error
        self._end(request, "error", lambda: request.end("error", failure))

    def _end(self, request: RoutedRequest, reason: str, publish: Callable[[], None]) -> None:
        """The one terminal state of a request."""
        self.num_finished[reason] += 1
        self.open.pop(request.id, None)
        publish()
        if not self.open:
            self._on_change()
