"""What a simulated device takes for a step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

    from batchcore.stats import EngineStats

__all__ = ["SimDevice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimDevice:
    """Seconds that a decode call takes, linear in what it computes.

    The engine fits the same four terms to a real device while it runs, and plans with them.
    """

    base_s: float
    """Once per call."""
    prefill_token_s: float
    """Per token of a chunk of a prompt."""
    decode_row_s: float
    """Per sequence that decodes one token."""
    kv_token_s: float = 0.0
    """Per KV token that a row attends to."""
    loose_row_s: float = 0.0
    """More for each row beyond a multiple of four, as kernels that take rows in fours have it."""
    copied_token_s: float = 0.0
    """Per KV token that is copied to or from host memory, where a sequence has to give way."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One is negative or not finite, or a call could take no time at all.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(f"{field.name} must be a number of at least 0, not {value!r}")
        if self.base_s + min(self.prefill_token_s, self.decode_row_s) <= 0:
            raise ConfigError("a call must take time: base_s is 0, and so is a cost per row")

    @classmethod
    def fitted(cls, stats: EngineStats, *, copied_token_s: float = 0.0) -> Self:
        """The device that an engine has run on, by what its calls were measured to take.

        The fit follows the last hundred calls or so: take it after a load like the one to simulate.

        Raises:
            ConfigError: The engine has not worked enough to know.
        """
        base_s, prefill_token_s, decode_row_s, kv_token_s = stats.cost_s
        if base_s + min(prefill_token_s, decode_row_s) <= 0:
            raise ConfigError("the engine has not run enough steps to know what they take")
        return cls(
            base_s=base_s,
            prefill_token_s=prefill_token_s,
            decode_row_s=decode_row_s,
            kv_token_s=kv_token_s,
            copied_token_s=copied_token_s,
        )

    def call_s(self, *, prefill_tokens: int = 0, decode_rows: int = 0, kv_tokens: int = 0) -> float:
        """Seconds of one call, `loose_row_s` apart; `kv_tokens` is summed over its rows."""
        return (
            self.base_s
            + self.prefill_token_s * prefill_tokens
            + self.decode_row_s * decode_rows
            + self.kv_token_s * kv_tokens
        )

    def to_dict(self) -> dict[str, float]:
        """All costs, ready for JSON."""
        return asdict(self)
