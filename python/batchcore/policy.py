"""Who goes first, who may have how much, and who is refused: what an engine is told about that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from batchcore.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SchedulingPolicy", "Tier"]

_INT32 = range(-(2**31), 2**31)
_MAX_USER_LENGTH = 256


def _check_priority(value: object, error: type[ValueError]) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value not in _INT32:
        raise error(f"priority must be a 32-bit integer, not {value!r:.80}")


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r:.80}")


def _check_number(
    name: str, value: float, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= above or value < least:
        bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise ConfigError(f"{name} must be a number, {bound}, not {value!r:.80}")


@dataclass(frozen=True, slots=True)
class Tier:
    """A quality of service. Requests name it, or give its `priority`, where lower goes first."""

    name: str
    priority: int
    max_num_seqs: int | None = None
    """Sequences of this tier that may run at a time; None means no limit of its own."""
    reserved_seqs: int = 0
    """Slots that no worse tier may take."""

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a tier's name must be a text, not {self.name!r}")
        _check_priority(self.priority, ConfigError)
        if self.max_num_seqs is not None:
            _check_count(f"max_num_seqs of tier {self.name!r}", self.max_num_seqs, least=1)
        _check_count(f"reserved_seqs of tier {self.name!r}", self.reserved_seqs, least=0)


_TIERS = (Tier("interactive", -1), Tier("standard", 0), Tier("batch", 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingPolicy:
    """How an engine shares itself between tiers and users. The defaults share it fairly.

    Users of one tier are served by weighted virtual token counters (Sheng et al., "Fairness in
    Serving Large Language Models", OSDI'24, arXiv 2401.00588): next is whoever got least, and being
    idle earns nothing.
    """

    tiers: Sequence[Tier] = _TIERS
    """Names for priorities, and their limits. Other priorities may be used as numbers."""
    aging_s: float | None = 30.0
    """Seconds of waiting that lift a request by one priority, so that low tiers don't starve; None
    means never. Nobody is lifted above the best priority that others wait with."""
    preempt_for_slots: bool = True
    """A sequence of a worse tier gives its slot to a request of a better one."""
    user_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of users, above 0; all others have 1."""
    prompt_token_cost: float = 1.0
    """What a prompt token counts; those from the prefix cache count nothing."""
    output_token_cost: float = 2.0
    """What a generated token counts."""
    max_queued_requests_per_user: int | None = None
    """Requests of one user that wait for a slot at most; beyond, QueueFullError."""
    max_queued_tokens_per_user: int | None = None
    """Prompt tokens of those at most."""
    shed: bool = False
    """Refuse at once who is predicted to wait longer than its timeout."""

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        object.__setattr__(self, "tiers", tuple(self.tiers))
        object.__setattr__(self, "user_weights", MappingProxyType(dict(self.user_weights)))
        for what in ("name", "priority"):
            values = [getattr(tier, what) for tier in self.tiers]
            if len(set(values)) < len(values):
                raise ConfigError(f"two tiers have the same {what}")
        if self.aging_s is not None:
            _check_number("aging_s", self.aging_s, above=0.0)
        for user, weight in self.user_weights.items():
            check_user(user, ConfigError)
            _check_number(f"the weight of user {user!r}", weight, above=0.0)
        for name in ("prompt_token_cost", "output_token_cost"):
            _check_number(name, getattr(self, name), least=0.0)
        for name in ("max_queued_requests_per_user", "max_queued_tokens_per_user"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value: a read-only view of a dict can't be."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return _rebuild, (values | {"user_weights": dict(self.user_weights)},)

    def priority_of(self, priority: int | str) -> int:
        """The number that a tier's name, or a number, stands for.

        Raises:
            InvalidRequestError: There is no such tier, or the number has more than 32 bits.
        """
        if isinstance(priority, str):
            for tier in self.tiers:
                if tier.name == priority:
                    return tier.priority
            known = ", ".join(tier.name for tier in self.tiers)
            raise InvalidRequestError(f"there is no tier {priority!r}, only {known}")
        _check_priority(priority, InvalidRequestError)
        return priority

    def native_options(self) -> dict[str, Any]:
        """What the C++ engine takes."""
        return {
            "aging_s": self.aging_s or 0.0,
            "preempt_for_slots": self.preempt_for_slots,
            "user_weights": {encode_user(user): w for user, w in self.user_weights.items()},
            "prompt_token_cost": self.prompt_token_cost,
            "output_token_cost": self.output_token_cost,
            "max_queued_requests_per_user": self.max_queued_requests_per_user or 0,
            "max_queued_tokens_per_user": self.max_queued_tokens_per_user or 0,
            "shed": self.shed,
            "tier_limits": [
                (tier.priority, tier.max_num_seqs or 0, tier.reserved_seqs)
                for tier in self.tiers
                if tier.max_num_seqs is not None or tier.reserved_seqs > 0
            ],
        }


def _rebuild(values: dict[str, Any]) -> SchedulingPolicy:
    return SchedulingPolicy(**values)


def check_user(user: object, error: type[ValueError] = InvalidRequestError) -> None:
    """Refuse what is no user's name: any text of at most 256 characters is one."""
    if not isinstance(user, str):
        raise error(f"user must be a text, not {user!r:.80}")
    if len(user) > _MAX_USER_LENGTH:
        raise error(f"user must have at most {_MAX_USER_LENGTH} characters, not {len(user)}")


def encode_user(user: str) -> bytes:
    """Any text as bytes, lone surrogates included; different texts stay different."""
    return user.encode("utf-8", "surrogatepass")


def check_timeout(name: str, value: object) -> None:
    """Refuse what is no time to wait: zero, negative, NaN, or no number."""
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise InvalidRequestError(f"{name} must be above 0 seconds, not {value!r:.80}")
