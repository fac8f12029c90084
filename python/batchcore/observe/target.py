"""What is watched: an Engine, an AsyncEngine, or anything else that has `stats()`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchcore.async_engine import AsyncEngine
from batchcore.engine import Engine

if TYPE_CHECKING:
    from batchcore.stats import EngineStats

__all__ = ["HasStats", "inner_engine", "is_closed", "model_name_of", "tier_names_of"]


class HasStats(Protocol):
    """An Engine, an AsyncEngine, or a stand-in for one."""

    def stats(self) -> EngineStats:
        """A consistent copy of the counters."""


def inner_engine(target: object) -> Engine | None:
    """The Engine that does the work; None where it is not loaded yet, or there is none."""
    if isinstance(target, AsyncEngine):
        return target._engine
    return target if isinstance(target, Engine) else None


def is_closed(target: object) -> bool:
    """Whether it will never do anything again. A stand-in never says so."""
    if isinstance(target, AsyncEngine) and target._closed:
        return True
    engine = inner_engine(target)
    return engine is not None and engine.closed


def model_name_of(target: object) -> str:
    """The model's file without folder and suffix; empty where there is no model yet."""
    engine = inner_engine(target)
    return Path(engine.model.path).stem if engine is not None else ""


def tier_names_of(target: object) -> dict[int, str]:
    """Names of the tiers by priority; empty where there is no engine yet."""
    engine = inner_engine(target)
    return {} if engine is None else {tier.priority: tier.name for tier in engine.policy.tiers}
