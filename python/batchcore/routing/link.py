"""A replica's engine as the event loop sees it: requests in, updates out, tokens to go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from batchcore import _core
from batchcore.errors import RequestTimeoutError
from batchcore.policy import encode_user
from batchcore.routing.policies import ReplicaLoad
from batchcore.submission import _to_native

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchcore.engine import Engine
    from batchcore.submission import Submission

__all__ = ["Attempt", "EngineLink", "Update"]

Update: TypeAlias = (
    "tuple[list[_core._Delta], bool, BaseException | None, _core._Metrics]"  # of a RequestChannel
)

_ROOM_NEWS = 0  # Engine::kRoomNews


class Attempt:
    """A request as one engine has it, until that has ended it."""

    __slots__ = ("_channel", "_engine", "_on_update", "output_tokens", "prompt_tokens")

    def __init__(
        self,
        engine: Engine,
        channel: _core.RequestChannel,
        on_update: Callable[[Update], None],
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        """Nothing has been computed yet."""
        self._engine = engine
        self._channel = channel
        self._on_update = on_update
        self.prompt_tokens = prompt_tokens
        """Still to compute, as far as is known."""
        self.output_tokens = output_tokens
        """Still to generate, at most."""

    @property
    def id(self) -> int:
        """The engine's id of it."""
        return self._channel.id

    def abort(self) -> None:
        """Let the engine end it as `cancelled`. From any thread."""
        self._engine.abort(self.id)


class EngineLink:
    """One engine, from when it is there until nothing of it is left. Belongs to one event loop.

    It takes what is published as soon as the loop is woken, whether or not anybody waits for it:
    only so are failures seen when they happen, and the load is known.
    """

    def __init__(self, engine: Engine, on_room: Callable[[], None]) -> None:
        """Listen to the engine; `on_room` is called when its queue has got room."""
        self.engine = engine
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._attempts: dict[int, Attempt] = {}
        self._outstanding_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._notifier: _core.Notifier | None = _core.Notifier()
        self._loop.add_reader(self._notifier.fd, self._dispatch)

    @property
    def load(self) -> ReplicaLoad:
        """What this router's requests still need of it."""
        return ReplicaLoad(self._outstanding_tokens, len(self._attempts))

    @property
    def is_draining(self) -> bool:
        """Whether somebody drains the engine, which then refuses everything for a while."""
        return self.engine.stats().is_draining

    def submit(
        self,
        submission: Submission,
        on_update: Callable[[Update], None],
        *,
        streams: bool,
        pins: bool = False,
        num_cached_tokens: int = 0,
    ) -> Attempt:
        """Queue a request; its updates are passed on one by one, on the event loop.

        Args:
            submission: What is asked for. The engine's own admission hook sees it too.
            on_update: Called with what the request has given since the call before.
            streams: Report tokens as they come, not only at the end.
            pins: Keep the prompt's cells.
            num_cached_tokens: How much of the prompt need not be computed, as far as is known.

        Raises:
            InvalidRequestError, QueueFullError, EngineClosedError: As `Engine.submit`.
        """
        engine = self.engine
        if engine.on_submit is not None and not pins:
            submission = engine.on_submit(submission) or submission
        (channel,) = engine._native.submit(
            [_to_native(engine, submission)], streams, pins, False, self._notifier
        )
        params = submission.params
        attempt = Attempt(
            engine,
            channel,
            on_update,
            max(0, len(submission.prompt_token_ids) - num_cached_tokens),
            min(params.max_tokens, engine.max_sequence_tokens) * params.n,
        )
        self._attempts[attempt.id] = attempt
        self._outstanding_tokens += attempt.prompt_tokens + attempt.output_tokens
        self._idle.clear()
        return attempt

    async def run(self, submission: Submission, *, pins: bool = False) -> int:
        """Queue a request, wait for its end and return its id; for probes and prefixes to keep.

        Raises:
            RequestTimeoutError: Its timeout passed.
            RequestError, EngineError: As `Engine.generate`.
        """
        end: asyncio.Future[Update] = self._loop.create_future()

        def on_update(update: Update) -> None:
            if update[1] and not end.done():
                end.set_result(update)

        attempt = self.submit(submission, on_update, streams=False, pins=pins)
        try:
            deltas, _, error, _ = await end
            if error is not None:
                raise error
            if any(delta[4] == "timeout" for delta in deltas):
                raise RequestTimeoutError("the request was not finished within its timeout")
        except BaseException:
            attempt.abort()
            if pins:  # it may have been kept already, and nobody else knows how to let go of it
                self.engine._native.unpin(attempt.id)
            raise
        return attempt.id

    def has_room(self, user: str, num_tokens: int) -> bool:
        """Whether the queue has room; where not, `on_room` is called when that changes.

        Raises:
            EngineClosedError: The engine takes no more requests.
        """
        native = self.engine._native
        assert self._notifier is not None
        # Watched first, so that room that comes between the two is not missed.
        native.watch_room(self._notifier)
        return native.has_room(encode_user(user), 1, num_tokens)

    def abort_all(self) -> None:
        """End every request that came through here as `cancelled`."""
        for attempt in list(self._attempts.values()):
            attempt.abort()

    async def detach(self) -> None:
        """Wait until every request has ended, and stop listening. Who calls it has ended them."""
        await self._idle.wait()
        if self._notifier is not None:
            self._loop.remove_reader(self._notifier.fd)
            self._notifier = None

    def _dispatch(self) -> None:
        if self._notifier is None:
            return
        for request_id in self._notifier.take():
            if request_id == _ROOM_NEWS:
                self._on_room()
                continue
            attempt = self._attempts.get(request_id)
            update = None if attempt is None else attempt._channel.take()
            if attempt is None or update is None:
                continue
            self._account(attempt, update)
            if update[1]:
                del self._attempts[request_id]
                if not self._attempts:
                    self._idle.set()
            attempt._on_update(update)

    def _account(self, attempt: Attempt, update: Update) -> None:
        deltas, is_finished, _, _ = update
        before = attempt.prompt_tokens + attempt.output_tokens
        num_generated = sum(len(delta[2]) for delta in deltas)
        if num_generated:
            attempt.prompt_tokens = 0
            attempt.output_tokens = max(0, attempt.output_tokens - num_generated)
        if is_finished:
            attempt.prompt_tokens = attempt.output_tokens = 0
        self._outstanding_tokens += attempt.prompt_tokens + attempt.output_tokens - before
