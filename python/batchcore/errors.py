"""The error tree of batchcore: every exception it raises on purpose derives from BatchcoreError.

This module imports nothing but typing, so that any part of the package, the native core's
translator included, can name an error without a cost. Cancellation is a finish reason, and so no
error.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BatchcoreError",
    "ConfigError",
    "DecodeError",
    "EngineClosedError",
    "EngineError",
    "InvalidRequestError",
    "ModelDownloadError",
    "ModelLoadError",
    "PromptTooLongError",
    "QueueFullError",
    "RequestError",
    "RequestTimeoutError",
    "StaleViewError",
    "ViewInUseError",
]


def _rebuild(
    cls: type[BatchcoreError], args: tuple[object, ...], state: dict[str, object]
) -> BatchcoreError:
    # Bypasses __init__, whose keyword-only attributes the default protocol can't pass. `args` is
    # set by hand because OSError (a base of TimeoutError) leaves it empty in __new__.
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class BatchcoreError(Exception):
    """Base of every error that batchcore raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all attributes, so that errors cross process borders unchanged."""
        return _rebuild, (type(self), self.args, self.__dict__.copy())


class ConfigError(BatchcoreError, ValueError):
    """Raised when an engine, model or command is configured with values that can't work."""


class ModelLoadError(BatchcoreError):
    """Raised when a model is missing, truncated, not a GGUF, or refused by llama.cpp."""


class ModelDownloadError(ModelLoadError):
    """Raised when a model can't be pulled.

    `reason` is one of `network`, `not_found`, `pip`, `disk`, `corrupt`, `lock` and `extra` (an
    optional package is missing).
    """

    def __init__(self, message: str, *, model: str | None = None, reason: str = "network") -> None:
        """Keep what failed, so that callers can branch without reading the message."""
        super().__init__(message)
        self.model = model
        self.reason = reason


class RequestError(BatchcoreError):
    """Raised when one request fails; others are not affected."""

    def __init__(self, message: str, *, request_id: int | str | None = None) -> None:
        """Keep the request's id; None where it has none yet."""
        super().__init__(message)
        self.request_id = request_id


class InvalidRequestError(RequestError, ValueError):
    """Raised at submit when a prompt or a sampling parameter can't be accepted."""


class PromptTooLongError(InvalidRequestError):
    """Raised at submit when a prompt's `num_tokens` exceed the `limit` a sequence can hold."""

    def __init__(
        self, message: str, *, num_tokens: int, limit: int, request_id: int | str | None = None
    ) -> None:
        """Keep both counts, in tokens."""
        super().__init__(message, request_id=request_id)
        self.num_tokens = num_tokens
        self.limit = limit


class QueueFullError(RequestError):
    """Raised at submit when the waiting queue is at its `capacity`; retry later (HTTP 429).

    `retry_after_s` estimates when, in seconds: the Retry-After of HTTP.
    """

    def __init__(
        self,
        message: str,
        *,
        capacity: int,
        retry_after_s: float = 1.0,
        request_id: int | str | None = None,
    ) -> None:
        """Keep the bound that was hit, in the unit that the message names, and the estimate."""
        super().__init__(message, request_id=request_id)
        self.capacity = capacity
        self.retry_after_s = retry_after_s


class RequestTimeoutError(RequestError, TimeoutError):
    """Raised when a request's deadline passes before it is finished.

    `output` is the RequestOutput with what was generated until then.
    """

    def __init__(
        self, message: str, *, request_id: int | str | None = None, output: Any = None
    ) -> None:
        """Keep what there is of the output."""
        super().__init__(message, request_id=request_id)
        self.output = output


class EngineError(BatchcoreError):
    """Raised when the engine itself can't go on."""


class EngineClosedError(EngineError):
    """Raised when a closed engine is used, or an engine is closed with requests in flight."""


class DecodeError(EngineError):
    """Raised when llama.cpp fails to decode a batch with the given `status`."""

    def __init__(self, message: str, *, status: int) -> None:
        """Keep what llama.cpp returned."""
        super().__init__(message)
        self.status = status


class StaleViewError(BatchcoreError):
    """Raised when a view of logits or embeddings is read after the next decode."""


class ViewInUseError(BatchcoreError, BufferError):
    """Raised when a context is to decode while an array over its last result is still alive."""
