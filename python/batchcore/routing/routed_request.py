"""A request of a Router, from its first submit to its end, over all the replicas that try it."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Literal

from batchcore.handle import AsyncRequestHandle

if TYPE_CHECKING:
    import weakref

    from batchcore.outputs import RequestOutput
    from batchcore.routing.link import Attempt, Update
    from batchcore.submission import Submission

__all__ = ["RoutedRequest", "RouterHandle"]

_LATENCY_ORIGIN, _ADMITTED = 0, 1  # of an update's metrics


class RoutedRequest:
    """What a handle reads from, in place of an engine's channel.

    It keeps what the consumer has not taken yet. As long as nothing was taken, the request can
    start again on another replica, and the consumer sees only the last attempt.
    """

    def __init__(self, request_id: int, submission: Submission, *, streams: bool) -> None:
        """A request that no replica has yet."""
        self.id = request_id
        """Unique over the router's life; the engines have ids of their own."""
        self.submission = submission
        """As the admission hook left it."""
        self.streams = streams
        """Whether news are reported as they come."""
        self.handle: weakref.ref[AsyncRequestHandle] | None = None
        self.attempt: Attempt | None = None
        """Where it is now; None between two attempts and after the last."""
        self.num_attempts = 0
        self.tried: set[int] = set()
        """Replicas that it had."""
        self.error: BaseException | None = None
        """What ended the attempt before."""
        self.is_cancelled = False
        """Whether its consumer wants no more of it."""
        self.is_finished = False
        """Whether its end has come, read or not."""
        self.is_read = False
        """Whether its consumer has seen anything."""
        self.holds_back = False
        """Whether news are kept until the end, for a consumer that only waits for that."""
        self._submitted = time.monotonic()
        self._pending: Update | None = None
        self._origin: float | None = None
        self._was_admitted = False

    def take(self) -> Update | None:
        """What is new, if anything; a channel's method, for the handle."""
        if self._pending is None or (self.holds_back and not self.is_finished):
            return None
        update, self._pending = self._pending, None
        self.is_read = self.is_read or bool(update[0])
        return update

    def publish(self, update: Update) -> None:
        """Add news of the current attempt and wake the consumer."""
        deltas, is_finished, error, metrics = update
        if self._origin is not None:  # latencies count from the first submit
            metrics = (self._origin, *metrics[1:])
        if self._pending is not None:
            deltas = _merged(self._pending[0], deltas)
        self._pending = (deltas, is_finished, error, metrics)
        self.is_finished = is_finished
        self.wake()

    def wake(self) -> None:
        """Let the consumer look."""
        handle = self.handle() if self.handle is not None else None
        if handle is not None:
            handle._wake()

    def restart(self, update: Update) -> None:
        """Forget an attempt that has failed before anything of it was read."""
        _, _, self.error, metrics = update
        if self._origin is None:
            self._origin = metrics[_LATENCY_ORIGIN]
        self._was_admitted = self._was_admitted or metrics[_ADMITTED] > 0
        self._pending = None

    def end(
        self, reason: Literal["cancelled", "timeout", "error"], error: BaseException | None = None
    ) -> None:
        """Give it a terminal state that no engine gave it."""
        count = self.submission.params.n
        now = time.monotonic()  # the engine's clock too
        self.publish(
            (
                [(index, "", [], [], reason, None) for index in range(count)],
                True,
                error,
                (now if self._origin is None else self._origin, 0.0, 0.0, now, 0, 0, 0, 0),
            )
        )

    def cancel(self) -> None:
        """End it wherever it is. From any thread."""
        self.is_cancelled = True
        attempt = self.attempt
        if attempt is not None:
            attempt.abort()

    def remaining(self) -> Submission | None:
        """What to ask the next replica for: what is left of the timeouts; None where nothing is.

        A request that had its slot in time has kept its `queue_timeout`, which then is over.
        """
        if self.num_attempts == 0:
            return self.submission
        passed = time.monotonic() - self._submitted
        left: dict[str, Any] = {}
        for name in ("timeout", "queue_timeout"):
            seconds = getattr(self.submission, name)
            if seconds is None:
                continue
            if name == "queue_timeout" and self._was_admitted:
                left[name] = None
                continue
            left[name] = seconds - passed
            if left[name] <= 0:
                return None
        return dataclasses.replace(self.submission, **left)


def _merged(old: list[Any], new: list[Any]) -> list[Any]:
    """Deltas of the same completion as one, as the engine merges what nobody has read yet."""
    by_index = {delta[0]: delta for delta in old}
    for delta in new:
        index, text, tokens, logprobs, reason, stop = delta
        before = by_index.get(index)
        if before is not None:
            before[2].extend(tokens)  # the lists are ours: the binding made them for this update
            before[3].extend(logprobs)
            delta = (index, before[1] + text, before[2], before[3], reason, stop)  # noqa: PLW2901
        by_index[index] = delta
    return list(by_index.values())


class RouterHandle(AsyncRequestHandle):
    """A request to a `Router`. Iterate it for deltas, or await it for the whole output.

    Who iterates it has seen something at the first delta; from then on it can't move to another
    replica. Who awaits it sees nothing before the end, so that it still can.
    """

    _channel: RoutedRequest  # type: ignore[assignment]

    async def _whole(self) -> RequestOutput:
        self._channel.holds_back = True
        return await super()._whole()
