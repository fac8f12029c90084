"""Prefixes that stay in the KV memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from batchcore import _core

__all__ = ["PinnedPrefix"]


class PinnedPrefix:
    """A prompt's cells that are kept for others which start alike; made by `Engine.warm`.

    They stay until `release`, or until a single request could not go on without their cells. An
    object that is dropped releases nothing.
    """

    def __init__(self, native: _core.Engine, request_id: int, num_tokens: int) -> None:
        """Keep what it takes to let go."""
        self._native = native
        self._request_id = request_id
        self.num_tokens = num_tokens
        """Tokens that it holds."""

    def __repr__(self) -> str:
        """Its length."""
        return f"PinnedPrefix(num_tokens={self.num_tokens})"

    def release(self) -> None:
        """Make it an ordinary cached prefix, which goes when its cells are needed. Idempotent."""
        self._native.unpin(self._request_id)

    def __enter__(self) -> Self:
        """Nothing to do: it is there."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release."""
        self.release()
