"""What a caller asks of the sampler."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["SamplingParams"]

_MAX_INT32 = 2**31 - 1
_MAX_UINT64 = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Immutable; checked when it is made.

    The stages run in this order: `logit_bias`, `min_tokens`, penalties, `temperature`, `min_p`,
    `top_k`, `top_p`, draw. Names and meaning are vLLM's.

    Raises:
        InvalidRequestError: A value is out of its range; the message names it.
    """

    max_tokens: int = 16
    """Tokens to generate at most, at least 1."""
    min_tokens: int = 0
    """Before this many tokens nothing stops the output: stop tokens are not chosen, stop strings
    not looked for."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0 (or -1) means all."""
    top_p: float = 1.0
    """Choose among the fewest most likely tokens that together have this probability, (0, 1]."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the most likely one, [0, 1]."""
    repetition_penalty: float = 1.0
    """Makes tokens of prompt and output less likely above 1, more likely below; greater than 0."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it is in the output."""
    seed: int | None = None
    """Same seed, same tokens, whatever else the engine runs; None draws one per request."""
    stop: str | Sequence[str] = ()
    """Strings that end the output; they are not part of its text."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output; they are in `token_ids` but not in the text."""
    ignore_eos: bool = False
    """Go on behind the model's end-of-generation tokens."""
    logprobs: int | None = None
    """Report log-probabilities of the token chosen and of this many most likely ones."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    n: int = 1
    """Completions of the prompt, which is computed once."""

    def __post_init__(self) -> None:
        """Check every value, and turn the sequences into tuples."""
        stop = (self.stop,) if isinstance(self.stop, str) else _as(tuple, "stop", self.stop)
        object.__setattr__(self, "stop", stop)
        for name, kind in (("stop_token_ids", tuple), ("logit_bias", dict)):
            object.__setattr__(self, name, _as(kind, name, getattr(self, name)))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_integers()
        self._check_floats()
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}"
            )
        texts: tuple[object, ...] = stop
        if not all(isinstance(text, str) and text and _is_utf8(text) for text in texts):
            raise InvalidRequestError("stop must be non-empty strings without lone surrogates")

    def _check_integers(self) -> None:
        rows: tuple[tuple[str, object, int, int], ...] = (
            ("max_tokens", self.max_tokens, 1, _MAX_INT32),
            ("min_tokens", self.min_tokens, 0, _MAX_INT32),
            ("top_k", self.top_k, 0, _MAX_INT32),
            ("n", self.n, 1, _MAX_INT32),
            ("seed", 0 if self.seed is None else self.seed, 0, _MAX_UINT64),
            ("logprobs", 0 if self.logprobs is None else self.logprobs, 0, _MAX_INT32),
            *(("stop_token_ids", token, 0, _MAX_INT32) for token in self.stop_token_ids),
            *(("logit_bias", token, 0, _MAX_INT32) for token in self.logit_bias),
        )
        for name, value, low, high in rows:
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
            if not low <= value <= high:
                raise InvalidRequestError(f"{name} must be {low} to {high}, not {value}")

    def _check_floats(self) -> None:
        rows: tuple[tuple[str, object, Callable[[Any], bool], str], ...] = (
            ("temperature", self.temperature, lambda x: x >= 0, "of 0 or more"),
            ("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0"),
            ("presence_penalty", self.presence_penalty, _is_finite, "that is finite"),
            ("frequency_penalty", self.frequency_penalty, _is_finite, "that is finite"),
            *(("logit_bias", x, _is_finite, "that is finite") for x in self.logit_bias.values()),
        )
        for name, value, fits, rule in rows:
            if not (_is_finite(value) and fits(value)):
                raise InvalidRequestError(f"{name} must be a number {rule}, not {value!r}")

    def _to_native(self) -> _core.SamplingParams:
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        values["seed"] = random.getrandbits(64) if self.seed is None else self.seed
        values["logprobs"] = -1 if self.logprobs is None else self.logprobs
        values["logit_bias"] = list(self.logit_bias.items())
        return _core.SamplingParams(values)


def _as(kind: Callable[[Any], Any], name: str, value: object) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} can't be {value!r}") from error


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
