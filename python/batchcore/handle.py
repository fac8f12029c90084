"""Handles of submitted requests, for threads and for event loops."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore import _log
from batchcore.errors import EngineError, RequestTimeoutError
from batchcore.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    RequestPadding,
    StreamDelta,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from batchcore import _core
    from batchcore.engine import Engine
    from batchcore.submission import Submission

__all__ = ["AsyncRequestHandle", "FinishedRequest", "Observer", "RequestHandle"]

_logger = logging.getLogger("batchcore")

# A thread that waits in C++ comes up this often to let Python handle signals such as Ctrl-C.
_SIGNAL_CHECK_S = 0.2


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has reached its terminal state, for observers."""

    submission: Submission
    """What was asked for."""
    output: RequestOutput
    """What it gave; shared with the handle."""
    submitted_at: float
    """When, in seconds since the epoch."""
    error: BaseException | None
    """Why it failed, where it did."""
    context: contextvars.Context | None = None
    """The context variables of who handed it in; None where nobody observed the engine then."""


Observer = Callable[[FinishedRequest], object]


def _call(observer: Observer, event: FinishedRequest) -> None:
    try:
        observer(event)
    except Exception:
        _logger.exception("an observer of finished requests failed")


class _Handle:
    """Collects what a request gives. One consumer at a time."""

    def __init__(
        self,
        engine: Engine,
        channel: _core.RequestChannel,
        submission: Submission,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._submission = submission
        self._was_told = False
        self._submitted_at = time.time()
        # For observers such as tracers, whose parent span is the one that was open at submit.
        self._context = contextvars.copy_context() if engine._observers else None
        self._with_logprobs = submission.params.logprobs is not None
        self._error: BaseException | None = None
        self.id: int = channel.id
        """The request's id, unique over the engine's life."""
        self._output = RequestOutput(
            request_id=self.id,
            prompt_token_ids=submission.prompt_token_ids,
            outputs=[
                CompletionOutput(index, logprobs=[] if self._with_logprobs else None)
                for index in range(submission.params.n)
            ],
        )

    @property
    def output(self) -> RequestOutput:
        """What has been consumed so far: the same object all along, filled as deltas are read."""
        return self._output

    @property
    def finished(self) -> bool:
        """Whether the last of it has been consumed."""
        return self._output.finished

    def cancel(self) -> None:
        """End the request as `cancelled` within one step; nothing happens where it has ended."""
        if not self._output.finished:
            self._engine.abort(self.id)

    def __del__(self) -> None:
        """A handle that nobody holds any more is a request that nobody waits for."""
        # Missing where __init__ did not get so far.
        output = getattr(self, "_output", None)
        if output is not None and not output.finished:
            self._leave()

    def _leave(self) -> None:
        """Nobody listens any more: a request that has not ended is cancelled, observers hear it."""
        if self._output.finished:
            return
        self.cancel()
        if self._engine._observers and not self._was_told:
            for completion in self._output.outputs:
                completion.finish_reason = completion.finish_reason or "cancelled"
            self._tell_observers()

    def _take(self) -> list[StreamDelta] | None:
        """Consume what is there; None where there is nothing new."""
        update = self._channel.take()
        if update is None:
            return None
        raw, finished, self._error, metrics = update
        deltas = [self._consume(*delta) for delta in raw]
        self._output.num_cached_tokens = metrics[4]
        if finished:
            self._output.metrics = self._metrics(*metrics[:6])
            self._output.padding = RequestPadding(metrics[6], metrics[7])
            self._output.finished = True
            self._tell_observers()
        return deltas

    def _tell_observers(self) -> None:
        if self._was_told or not self._engine._observers:
            return
        self._was_told = True  # who left may come back for the rest
        # Let go of here: a handle may be kept for longer than what its context refers to.
        context, self._context = self._context, None
        event = FinishedRequest(
            self._submission, self._output, self._submitted_at, self._error, context
        )
        for observer in self._engine._observers:
            _call(observer, event)

    def _consume(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        logprobs: list[Any],
        finish_reason: Any,
        stop_reason: int | str | None,
    ) -> StreamDelta:
        positions = None
        completion = self._output.outputs[index]
        if self._with_logprobs:
            positions = [TokenLogprobs(token, value, top) for (token, value), top in logprobs]
            assert completion.logprobs is not None
            completion.logprobs += positions
        completion.text += text
        completion.token_ids += token_ids
        completion.finish_reason = finish_reason
        completion.stop_reason = stop_reason
        return StreamDelta(self.id, index, text, token_ids, positions, finish_reason, stop_reason)

    def _metrics(
        self,
        arrival: float,
        admitted: float,
        first_token: float,
        ended: float,
        _num_cached: int,
        num_preemptions: int,
    ) -> RequestMetrics:
        longest = max(len(completion.token_ids) for completion in self._output.outputs)
        return RequestMetrics(
            queue_s=admitted - arrival if admitted else None,
            ttft_s=first_token - arrival if first_token else None,
            latency_s=ended - arrival,
            tpot_s=(ended - first_token) / (longest - 1) if longest > 1 else None,
            num_preemptions=num_preemptions,
        )

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error

    def _result(self) -> RequestOutput:
        self._raise_failure()
        if any(completion.finish_reason == "timeout" for completion in self._output.outputs):
            raise RequestTimeoutError(
                f"request {self.id} was not finished within its timeout",
                request_id=self.id,
                output=self._output,
            )
        return self._output


class RequestHandle(_Handle):
    """A request to an `Engine`. Iterate it for deltas, or take the whole `result`."""

    def __iter__(self) -> Iterator[StreamDelta]:
        """Yield deltas as they come; leaving the loop early cancels the request.

        Raises:
            EngineError: The request failed; DecodeError and EngineClosedError say how.
        """
        try:
            while not self._output.finished:
                yield from self._wait() or ()
            self._raise_failure()
        finally:
            self._leave()

    def result(self) -> RequestOutput:
        """Wait for the end and return everything.

        Raises:
            RequestTimeoutError: The request's timeout passed; what there is, is in its `output`.
            EngineError: The request failed; DecodeError and EngineClosedError say how.
        """
        try:
            while not self._output.finished:
                self._wait()
        finally:
            self._leave()
        return self._result()

    def _wait(self) -> list[StreamDelta] | None:
        deltas = self._take()
        if deltas is None and not self._channel.wait(_SIGNAL_CHECK_S):
            _log.forward()
        return deltas


class SteppedRequestHandle(RequestHandle):
    """A request to an engine with `autostart=False`: who waits for it does the stepping."""

    def _wait(self) -> list[StreamDelta] | None:
        deltas = self._take()
        if deltas is None:
            self._engine._native.step()  # Engine.step would consume the news of all
        return deltas


class AsyncRequestHandle(_Handle):
    """A request to an `AsyncEngine`. Iterate it for deltas, or await it for the whole output."""

    _waiter: asyncio.Future[None] | None = None

    async def __aiter__(self) -> AsyncIterator[StreamDelta]:
        """Yield deltas as they come; leaving the loop early cancels the request.

        Raises:
            EngineError: The request failed; DecodeError and EngineClosedError say how.
        """
        self._check_alone()
        try:
            while not self._output.finished:
                for delta in await self._next() or ():
                    yield delta
            self._raise_failure()
        finally:
            self._leave()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        """Wait for the end and return everything; cancelling the wait cancels the request.

        Raises:
            RequestTimeoutError: The request's timeout passed; what there is, is in its `output`.
            EngineError: The request failed; DecodeError and EngineClosedError say how.
        """
        return self._whole().__await__()

    async def _whole(self) -> RequestOutput:
        self._check_alone()
        try:
            while not self._output.finished:
                await self._next()
        finally:
            self._leave()
        return self._result()

    async def _next(self) -> list[StreamDelta] | None:
        deltas = self._take()
        if deltas is None:
            self._check_alone()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return deltas

    def _check_alone(self) -> None:
        if self._waiter is not None:
            raise EngineError(f"request {self.id} already has a consumer that waits for it")

    def _wake(self) -> None:
        """There is something to take. Called on the event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
