"""What is drawn for requests that are made up: when they arrive, how long they are, their prompts.

Everything comes from a `numpy.random.Generator`, so that a seed gives the same values again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from batchcore import prompts as bundled_prompts
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Distribution", "PromptWriter", "Tokenizer", "arrival_times", "generators"]

_MAX_TOKENS = 2**31 - 1
_FORMS = {
    "fixed": "fixed:TOKENS",
    "uniform": "uniform:MIN:MAX",
    "loguniform": "loguniform:MIN:MAX",
    "lognormal": "lognormal:MEDIAN:SIGMA[:MIN[:MAX]]",
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """Numbers of tokens, at least 1. Made from text by `parse`; `str` gives that text back.

    `fixed:128` is always the same. `uniform:20:800` has both ends. `loguniform:20:800` is uniform
    in the logarithm: as many between 20 and 40 as between 400 and 800. `lognormal:300:0.8:20:2000`
    has a median and the standard deviation of the logarithm; what is outside of the optional bounds
    becomes the bound.
    """

    kind: str
    """`fixed`, `uniform`, `loguniform` or `lognormal`."""
    low: int
    """The smallest value."""
    high: int
    """The largest value."""
    median: float | None = None
    """Of `lognormal`."""
    sigma: float | None = None
    """Of `lognormal`."""

    def __post_init__(self) -> None:
        """Check that the values make a distribution.

        Raises:
            ConfigError: They don't; the message says why.
        """
        if self.kind not in _FORMS:
            raise ConfigError(f"unknown distribution {self.kind!r}; known: {', '.join(_FORMS)}")
        if not 1 <= self.low <= self.high <= _MAX_TOKENS:
            raise ConfigError(
                f"{self.kind} needs 1 <= MIN <= MAX <= {_MAX_TOKENS}, "
                f"not {self.low} and {self.high}"
            )
        if self.kind == "fixed" and self.low != self.high:
            raise ConfigError(f"fixed has one value, not {self.low} and {self.high}")
        if (self.kind == "lognormal") != (self.median is not None and self.sigma is not None):
            raise ConfigError("lognormal has a median and a sigma, and no other distribution has")
        if self.median is not None and not 1 <= self.median <= _MAX_TOKENS:
            raise ConfigError(f"lognormal needs a median of 1 to {_MAX_TOKENS}, not {self.median}")
        if self.sigma is not None and not 0 <= self.sigma <= 20:
            raise ConfigError(f"lognormal needs a sigma of 0 to 20, not {self.sigma}")

    def __str__(self) -> str:
        """The text that `parse` makes it from."""
        if self.kind == "fixed":
            return f"fixed:{self.low}"
        if self.kind != "lognormal":
            return f"{self.kind}:{self.low}:{self.high}"
        bounds = f":{self.low}:{self.high}" if (self.low, self.high) != (1, _MAX_TOKENS) else ""
        return f"lognormal:{_short(self.median)}:{_short(self.sigma)}{bounds}"

    @classmethod
    def parse(cls, text: str | int | Distribution) -> Distribution:
        """Read `fixed:128`, `uniform:20:800` and so on; a plain number is `fixed`.

        Raises:
            ConfigError: It is none of them; the message says what is.
        """
        if isinstance(text, Distribution):
            return text
        kind, *values = str(text).strip().split(":")
        if not values and kind.isdecimal():
            kind, values = "fixed", [kind]
        if kind not in _FORMS:
            raise ConfigError(
                f"unknown distribution {text!r}; it must be one of: {', '.join(_FORMS.values())}"
            )
        try:
            if kind == "fixed":
                (low,) = (int(value) for value in values)
                return cls(kind, low, low)
            if kind != "lognormal":
                low, high = (int(value) for value in values)
                return cls(kind, low, high)
            median, sigma, *bounds = values
            low, high = (*(int(value) for value in bounds), *(1, _MAX_TOKENS)[len(bounds) :])
            return cls(kind, low, high, float(median), float(sigma))
        except ConfigError as error:
            raise ConfigError(f"{text!r}: {error}") from None
        except ValueError:
            raise ConfigError(f"{text!r} is not of the form {_FORMS[kind]}") from None

    def sample(self, rng: np.random.Generator, n: int) -> list[int]:
        """Draw `n` values, which depend only on the state of `rng`."""
        if self.kind == "fixed":
            return [self.low] * n
        if self.kind == "uniform":
            return [int(value) for value in rng.integers(self.low, self.high, n, endpoint=True)]
        if self.kind == "loguniform":
            # Up to high + 1, rounded down, so that each end has its share.
            logs = rng.uniform(math.log(self.low), math.log(self.high + 1), n)
            drawn = [int(math.exp(value)) for value in logs]
        else:
            assert self.median is not None
            assert self.sigma is not None
            drawn = [round(self.median * math.exp(self.sigma * z)) for z in rng.standard_normal(n)]
        return [min(max(value, self.low), self.high) for value in drawn]


def arrival_times(
    rng: np.random.Generator, n: int, *, request_rate: float = math.inf, burstiness: float = 1.0
) -> list[float]:
    """Seconds from the start at which `n` requests arrive, ascending; the first is 0.

    Args:
        rng: What draws them.
        n: Number of requests.
        request_rate: Requests per second on average; infinite means all at once.
        burstiness: Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes
            in bursts, more is more regular.

    Raises:
        ConfigError: A value can't work.
    """
    if not request_rate > 0:
        raise ConfigError(f"request_rate must be above 0, not {request_rate}")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness must be above 0 and finite, not {burstiness}")
    if math.isinf(request_rate) or n < 1:
        return [0.0] * n
    gaps = rng.gamma(burstiness, 1 / (request_rate * burstiness), n - 1)
    return [0.0, *(float(time) for time in gaps.cumsum())]


class Tokenizer(Protocol):
    """What makes tokens of a text; a `Model` is one."""

    def tokenize_prompt(self, text: str) -> list[int]:
        """The tokens of a whole prompt."""


class PromptWriter:
    """Makes up prompts of an exact number of tokens."""

    def __init__(self, tokenizer: Tokenizer | int, rng: np.random.Generator) -> None:
        """Take a model, or the size of a vocabulary for token ids without meaning.

        Raises:
            ConfigError: It has not enough tokens.
        """
        self._rng = rng
        self._tokenizer = tokenizer
        self._head: list[int] = []
        self._tail: list[int] = []
        if isinstance(tokenizer, int):
            if tokenizer < 2:
                raise ConfigError(f"a vocabulary needs at least 2 tokens, not {tokenizer}")
            self._starts = [int(token) for token in rng.permutation(tokenizer)]
        else:
            tokens = tokenizer.tokenize_prompt(" ".join(_words()))
            other = tokenizer.tokenize_prompt("1 2 3")
            # BOS and EOS, where the model wants them.
            self._head = _common_start(tokens, other)
            self._tail = _common_start(tokens[::-1], other[::-1])
            known = sorted(set(tokens) - {*self._head, *self._tail})
            if not known:
                raise ConfigError("the tokenizer gives no tokens for English words")
            self._starts = [known[int(index)] for index in rng.permutation(len(known))]
        self._num_written = 0

    def write(self, num_tokens: int, *, bos: bool = True) -> tuple[int, ...]:
        """The next prompt. No two have the same start before all starts have been used."""
        start: list[int] = []
        rest = self._num_written
        self._num_written += 1
        # The number of the prompt in the base of the starts, least digit first.
        while rest or not start:
            rest, digit = divmod(rest, len(self._starts))
            start.append(self._starts[digit])
        head = [*(self._head if bos else ()), *start]
        return (*head, *self._prose(max(0, num_tokens - len(head))))[:num_tokens]

    def _prose(self, num_tokens: int) -> list[int]:
        if isinstance(self._tokenizer, int):
            return [int(token) for token in self._rng.integers(self._tokenizer, size=num_tokens)]
        words = _words()
        found: list[int] = []
        while len(found) < num_tokens:
            picks = self._rng.integers(len(words), size=num_tokens)
            tokens = self._tokenizer.tokenize_prompt(" ".join(words[index] for index in picks))
            found += tokens[len(self._head) : len(tokens) - len(self._tail)]
        return found[:num_tokens]


def generators(seed: int, count: int) -> list[np.random.Generator]:
    """Independent sources of randomness, always the same for a seed.

    Raises:
        ConfigError: The seed is negative.
    """
    import numpy as np  # noqa: PLC0415 - only needed here, and importing it takes long

    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    """Different words of the bundled prompts: in ASCII, so that no token is part of a character."""
    words = (word for text in bundled_prompts.load() for word in text.split())
    return tuple(dict.fromkeys(word for word in words if word.isascii() and word.isalpha()))


def _common_start(one: list[int], two: list[int]) -> list[int]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    return [token for token, _ in pairs]


def _short(value: float | None) -> str:
    return repr(value).removesuffix(".0")
