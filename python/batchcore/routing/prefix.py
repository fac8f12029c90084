"""Prefixes that stay in the KV memory of every replica."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from batchcore.errors import RequestError
from batchcore.params import SamplingParams
from batchcore.submission import Submission

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from batchcore.routing.link import EngineLink

__all__ = ["PinnedPrefixes"]

_logger = logging.getLogger("batchcore")


class PinnedPrefixes:
    """A prompt's cells that every replica keeps for others which start alike; by `Router.warm`.

    A replica that is brought back gets them again. They stay until `release`, or until a single
    request could not go on without their cells. An object that is dropped releases nothing.
    """

    def __init__(self, tokens: list[int], on_release: Callable[[PinnedPrefixes], None]) -> None:
        """On no replica yet."""
        self._tokens = tokens
        self._on_release = on_release
        self._is_released = False
        # By replica. Weak, as an engine that was replaced must not be kept from freeing its memory.
        self._pins: dict[int, tuple[weakref.ref[EngineLink], int]] = {}

    def __repr__(self) -> str:
        """Its length, and where it is."""
        return f"PinnedPrefixes(num_tokens={self.num_tokens}, replicas={sorted(self._pins)})"

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds, on each replica."""
        return len(self._tokens)

    def release(self) -> None:
        """Make them ordinary cached prefixes, which go when cells are needed. Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._on_release(self)
        for replica in list(self._pins):
            self._unpin(replica)

    def __enter__(self) -> Self:
        """Nothing to do: they are there."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release."""
        self.release()

    async def put_on(self, replica: int, link: EngineLink) -> None:
        """Compute and keep it on an engine, unless it is there.

        Raises:
            RequestError, EngineError: As `Engine.warm`.
        """
        before = self._pins.get(replica)
        if self._is_released or (before is not None and before[0]() is link):
            return
        once = Submission(self._tokens, SamplingParams(max_tokens=1))
        self._pins[replica] = (weakref.ref(link), await link.run(once, pins=True))
        if self._is_released:  # while it was computed
            self._unpin(replica)

    async def put_back(self, replica: int, link: EngineLink) -> None:
        """`put_on` where being spared a prefix matters less than having the replica.

        Raises:
            EngineError: The engine is no good after all.
        """
        try:
            await self.put_on(replica, link)
        except RequestError as error:
            _logger.warning("replica %d can't keep a prefix any more: %s", replica, error)

    def _unpin(self, replica: int) -> None:
        link, request_id = self._pins.pop(replica)
        engine_link = link()
        if engine_link is not None:
            engine_link.engine._native.unpin(request_id)
