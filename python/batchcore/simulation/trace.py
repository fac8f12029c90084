"""Requests of a simulation: when they come, how long they are, whose they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from batchcore import _core
from batchcore.bench.arrivals import Distribution, arrival_times, generators
from batchcore.errors import ConfigError
from batchcore.policy import check_user

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from typing_extensions import Self

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int32]
    TokenCounts = str | int | Distribution

__all__ = ["SimRequest", "Trace"]

_DEFAULTS = {
    "timeout_s": math.inf,
    "queue_timeout_s": math.inf,
    "user": 0,
    "priority": 0,
    "prefix_group": -1,
    "num_shared_tokens": 0,
}
_LEAST = {"num_prompt_tokens": 1, "num_output_tokens": 1, "num_shared_tokens": 0, "user": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One request, for a `SimulatedEngine` that is driven by hand."""

    arrival_s: float
    """On the simulation's clock, which starts at 0."""
    num_prompt_tokens: int
    num_output_tokens: int
    user: str = ""
    priority: int = 0
    """Lower goes first."""
    timeout_s: float = math.inf
    """From its arrival until it must be finished."""
    queue_timeout_s: float = math.inf
    """From its arrival until it must have a slot."""
    prefix_group: int = -1
    """Requests of one group start with the same tokens, as many as each shares; -1: none."""
    num_shared_tokens: int = 0
    key: int = 0
    """What its own tokens are made from: equal keys make equal prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival. Never changed once made.

    `of` makes one from arrays; `poisson`, `varying`, `day` and `flooding` make one up. A seed
    always gives the same requests.
    """

    requests: npt.NDArray[np.void]
    """One record per request; the properties below are its columns."""
    users: tuple[str, ...] = ("",)
    """Names that the column `user` counts."""

    @classmethod
    def of(cls, *, arrival_s: npt.ArrayLike, users: Sequence[str] = ("",), **columns: Any) -> Self:
        """A trace from arrays as long as `arrival_s`, or single values for all requests.

        `num_prompt_tokens` and `num_output_tokens` must be given; `user`, which counts `users`,
        `timeout_s`, `queue_timeout_s`, `priority`, `prefix_group`, `num_shared_tokens` and `key`
        may be.

        Raises:
            ConfigError: A column is unknown, missing, as long as no other, or can't work.
        """
        dtype = _core.sim_request_dtype()
        arrivals = np.asarray(arrival_s, np.float64)
        columns = {**_DEFAULTS, "key": np.arange(arrivals.size), **columns, "arrival_s": arrivals}
        if unknown := columns.keys() - set(dtype.names or ()):
            raise ConfigError(f"unknown column {min(unknown)!r} of a trace")
        requests = np.empty(arrivals.size, dtype)
        for name in dtype.names or ():
            if name not in columns:
                raise ConfigError(f"a trace needs {name}")
            try:
                requests[name] = columns[name]
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"{name} of a trace can't be used: {error}") from None
        return cls(requests, tuple(users))

    def __post_init__(self) -> None:
        """Check the values."""
        for user in self.users:
            check_user(user, ConfigError)
        columns = self.requests
        if columns.size == 0:
            return
        arrival_s = columns["arrival_s"]
        if not (
            arrival_s[0] >= 0 and np.isfinite(arrival_s[-1]) and (np.diff(arrival_s) >= 0).all()
        ):
            raise ConfigError("arrival_s must be finite, at least 0 and ascend")
        for name, least in _LEAST.items():
            if columns[name].min() < least:
                raise ConfigError(f"{name} must be at least {least}")
        for name in ("timeout_s", "queue_timeout_s"):
            if not (columns[name] > 0).all():
                raise ConfigError(f"{name} must be above 0")
        if (columns["num_shared_tokens"] > columns["num_prompt_tokens"]).any():
            raise ConfigError("num_shared_tokens must be at most num_prompt_tokens")
        if columns["user"].max() >= len(self.users):
            raise ConfigError("a request is of a user that has no name")

    @classmethod
    def poisson(
        cls,
        rate_per_s: float,
        duration_s: float,
        *,
        prompt_tokens: TokenCounts = 128,
        output_tokens: TokenCounts = 64,
        burstiness: float = 1.0,
        user: str = "",
        seed: int = 0,
        **columns: Any,
    ) -> Self:
        """Requests that come independently of each other, at the same rate all the time.

        Args:
            rate_per_s: Requests per second on average.
            duration_s: Nobody comes after.
            prompt_tokens: Number, or distribution as `Distribution.parse` reads it.
            output_tokens: The same.
            burstiness: As of `arrival_times`; other values than 1 are no Poisson process.
            user: Whose they all are.
            seed: Of all that is drawn.
            columns: More columns, as of `of`: single values, such as `priority`.

        Raises:
            ConfigError: A value can't work.
        """
        _check_duration(duration_s)
        times, lengths = generators(seed, 2)
        expected = rate_per_s * duration_s
        if not 0 < expected < 1e9:
            raise ConfigError("rate_per_s must be above 0, and less than 1e9 requests in all")
        # So many that one in a million traces would need more.
        most = math.ceil(expected + 5 * math.sqrt(expected / min(burstiness, 1.0))) + 10
        arrivals = np.array(
            arrival_times(times, most, request_rate=rate_per_s, burstiness=burstiness)
        )
        return cls._drawn(
            arrivals[arrivals < duration_s], lengths, prompt_tokens, output_tokens, user, columns
        )

    @classmethod
    def varying(
        cls,
        rate_at: Callable[[Floats], Floats],
        peak_rate_per_s: float,
        duration_s: float,
        *,
        prompt_tokens: TokenCounts = 128,
        output_tokens: TokenCounts = 64,
        user: str = "",
        seed: int = 0,
        **columns: Any,
    ) -> Self:
        """A Poisson process whose rate changes, by thinning one at its peak (Lewis & Shedler 1979).

        Args:
            rate_at: Requests per second at an array of times in seconds, at most the peak.
            peak_rate_per_s: The highest rate.
            duration_s: As of `poisson`, like all the others.
            prompt_tokens: Number or distribution.
            output_tokens: Number or distribution.
            user: Whose they all are.
            seed: Of all that is drawn.
            columns: More columns, single values.

        Raises:
            ConfigError: A value can't work.
        """
        _check_duration(duration_s)
        times, keeps, lengths = generators(seed, 3)
        expected = peak_rate_per_s * duration_s
        if not 0 < expected < 1e9:
            raise ConfigError("peak_rate_per_s must be above 0, and less than 1e9 requests in all")
        arrivals = np.sort(times.uniform(0, duration_s, times.poisson(expected)))
        rates = np.asarray(rate_at(arrivals), np.float64)
        if rates.shape != arrivals.shape or not ((rates >= 0) & (rates <= peak_rate_per_s)).all():
            raise ConfigError("rate_at must give a rate from 0 to the peak for each time")
        arrivals = arrivals[keeps.uniform(0, peak_rate_per_s, arrivals.size) < rates]
        return cls._drawn(arrivals, lengths, prompt_tokens, output_tokens, user, columns)

    @classmethod
    def day(
        cls, mean_rate_per_s: float, day_s: float, *, swing: float = 0.8, **options: Any
    ) -> Self:
        """A day of `day_s` seconds: a sine that is lowest at both ends and highest at noon.

        Args:
            mean_rate_per_s: Over the day.
            day_s: Length of the day; a real one has 86,400 s.
            swing: Noon's rate is `1 + swing` times the mean, midnight's `1 - swing`; at most 1.
            options: As of `varying`.

        Raises:
            ConfigError: A value can't work.
        """
        if not 0 <= swing <= 1:
            raise ConfigError(f"swing must be from 0 to 1, not {swing}")

        def rate_at(times: Floats) -> Floats:
            return mean_rate_per_s * (1 - swing * np.cos(2 * np.pi * times / day_s))

        return cls.varying(rate_at, mean_rate_per_s * (1 + swing), day_s, **options)

    @classmethod
    def flooding(
        cls,
        flood_rate_per_s: float,
        rate_per_s: float,
        duration_s: float,
        *,
        num_others: int = 4,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """One user, `flood`, among others, `user-1` and so on, who send `rate_per_s` each.

        `options` are those of `poisson`, for all of them.
        """
        rates = {"flood": flood_rate_per_s}
        rates.update({f"user-{number + 1}": rate_per_s for number in range(num_others)})
        return cls.merged(
            *(
                cls.poisson(rate, duration_s, user=user, seed=seed * 1000 + number, **options)
                for number, (user, rate) in enumerate(rates.items())
            )
        )

    @classmethod
    def merged(cls, *traces: Trace) -> Self:
        """All requests of several traces, each with a key of its own."""
        users = tuple(dict.fromkeys(user for trace in traces for user in trace.users))
        numbers = {user: number for number, user in enumerate(users)}
        parts = []
        for trace in traces:
            part = trace.requests.copy()
            part["user"] = np.array([numbers[user] for user in trace.users])[part["user"]]
            parts.append(part)
        requests = np.concatenate(parts)
        requests = requests[np.argsort(requests["arrival_s"], kind="stable")]
        requests["key"] = np.arange(requests.size)
        return cls(requests, users)

    @classmethod
    def _drawn(
        cls,
        arrivals: Floats,
        rng: np.random.Generator,
        prompt_tokens: TokenCounts,
        output_tokens: TokenCounts,
        user: str,
        columns: dict[str, Any],
    ) -> Self:
        return cls.of(
            arrival_s=arrivals,
            num_prompt_tokens=Distribution.parse(prompt_tokens).sample(rng, arrivals.size),
            num_output_tokens=Distribution.parse(output_tokens).sample(rng, arrivals.size),
            users=(user,),
            **columns,
        )

    def replaced(self, *, users: Sequence[str] | None = None, **columns: Any) -> Self:
        """The same requests with other columns: arrays, or single values for all."""
        kept = {name: self.requests[name] for name in self.requests.dtype.names or ()}
        return self.of(users=self.users if users is None else users, **(kept | columns))

    def of_one_user(self, user: str = "everybody") -> Self:
        """The same requests, all under one name: what an engine that knows no users would see."""
        return self.replaced(user=0, users=(user,))

    def at_speed(self, factor: float) -> Self:
        """The same requests, arriving `factor` times as fast."""
        if not 0 < factor < math.inf:
            raise ConfigError(f"the speed must be above 0, not {factor}")
        return self.replaced(arrival_s=self.arrival_s / factor)

    def with_prefix_groups(
        self, num_groups: int, shared_tokens: int, *, skew: float = 0.0, seed: int = 0
    ) -> Self:
        """Each prompt behind one of `num_groups` shared prefixes of `shared_tokens` more tokens.

        Args:
            num_groups: Different prefixes.
            shared_tokens: That each has, in front of the request's own tokens.
            skew: Group k is drawn with weight 1 / k ** skew: 0 is all alike, 1 is Zipf's law.
            seed: Of the draw.
        """
        if num_groups < 1 or shared_tokens < 1:
            raise ConfigError("prefix groups need at least one group and one token")
        (rng,) = generators(seed, 1)
        weights = 1 / np.arange(1, num_groups + 1, dtype=np.float64) ** skew
        return self.replaced(
            prefix_group=rng.choice(num_groups, size=len(self), p=weights / weights.sum()),
            num_shared_tokens=shared_tokens,
            num_prompt_tokens=self.num_prompt_tokens + shared_tokens,
        )

    def __len__(self) -> int:
        """Number of requests."""
        return self.requests.size

    @property
    def duration_s(self) -> float:
        """Until the last one comes."""
        return float(self.requests["arrival_s"][-1]) if len(self) else 0.0

    @property
    def arrival_s(self) -> Floats:
        """Seconds from the start."""
        return self.requests["arrival_s"]

    @property
    def num_prompt_tokens(self) -> Integers:
        """With the shared ones."""
        return self.requests["num_prompt_tokens"]

    @property
    def num_output_tokens(self) -> Integers:
        """Asked for."""
        return self.requests["num_output_tokens"]

    @property
    def user(self) -> Integers:
        """Index into `users`."""
        return self.requests["user"]

    @property
    def priority(self) -> Integers:
        """Lower goes first."""
        return self.requests["priority"]

    @property
    def prefix_group(self) -> Integers:
        """-1: none."""
        return self.requests["prefix_group"]


def _check_duration(duration_s: float) -> None:
    if not 0 < duration_s < math.inf:
        raise ConfigError(f"duration_s must be above 0 and finite, not {duration_s}")
