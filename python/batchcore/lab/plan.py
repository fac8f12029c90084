"""How much the lab measures: two sizes, cut down where a model is too slow for them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from batchcore.errors import ConfigError

__all__ = ["LabConfig", "Rates", "estimate_s", "fit_to_budget", "fit_to_context"]

_SCALES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_PEAKS_S = 4.0
_LEAST_LOAD_SCALE = 0.6  # with less, too few requests arrive for a queue to show


@dataclass(frozen=True, slots=True, kw_only=True)
class LabConfig:
    """Sizes of all parts. What is called a number of tokens is one per request."""

    quick: bool
    """A few minutes instead of up to twenty."""
    seed: int = 0
    """Of everything that is drawn."""
    n_threads: int
    """CPU threads of every engine."""
    repeats: int
    """Rounds of the parts that compare two ways of batching."""
    num_prompts: int = 8
    """Of parts 1 and 2; a static batch has as many."""
    prompt_tokens: int
    """Of parts 1, 2 and 3."""
    max_tokens: int
    """Of parts 1, 2, 5 and 6; in 5 and 6 the longest output."""
    short_max_tokens: int
    """Of parts 3 and 4; in 4 the longest output."""
    batch_sizes: tuple[int, ...]
    """Of part 3, ascending."""
    sweep_repeats: int
    """Rounds of part 3."""
    max_num_seqs: int = 8
    """Slots, and static batch size, of all parts but 3 and 4."""
    varied_tokens: tuple[int, int]
    """Shortest and longest prompt of parts 4, 5 and 6, drawn log-uniformly."""
    padding_prompts: int
    padding_batch_size: int
    padding_repeats: int
    dynamic_prompts: int
    """Of part 5."""
    load_fractions: tuple[float, ...] = (0.5, 0.8, 1.1)
    """Of part 6: arrivals per second, in what part 5 finished per second."""
    load_s: float
    """How long requests arrive at each of these rates."""
    min_load_requests: int = 8
    prefill_tokens: int
    """Of the prompt whose prefill is classified."""
    time_budget_s: float
    """What the whole is cut down to where it would take longer."""
    scale: float = 1.0
    """What it was cut down by."""

    def __post_init__(self) -> None:
        """Check what a caller can get wrong.

        Raises:
            ConfigError: A value can't work.
        """
        sizes = self.batch_sizes
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"batch_sizes must be ascending, from 1 on, not {list(sizes)}")
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and name not in {"quick", "seed"} and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        low, high = self.varied_tokens
        if not 1 <= low <= high:
            raise ConfigError(f"varied_tokens must be ascending, from 1 on, not {low}, {high}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {self.seed}")

    @classmethod
    def make(cls, *, quick: bool, n_threads: int, seed: int = 0) -> LabConfig:
        """The sizes of a quick or a full run."""
        if quick:
            return cls(
                quick=True,
                seed=seed,
                n_threads=n_threads,
                repeats=3,
                prompt_tokens=16,
                max_tokens=32,
                short_max_tokens=24,
                batch_sizes=(1, 2, 4, 8, 16),
                sweep_repeats=2,
                varied_tokens=(8, 64),
                padding_prompts=16,
                padding_batch_size=4,
                padding_repeats=2,
                dynamic_prompts=20,
                load_s=5.0,
                prefill_tokens=256,
                time_budget_s=120.0,
            )
        return cls(
            quick=False,
            seed=seed,
            n_threads=n_threads,
            repeats=5,
            prompt_tokens=32,
            max_tokens=100,
            short_max_tokens=50,
            batch_sizes=(1, 2, 4, 8, 16, 32),
            sweep_repeats=3,
            varied_tokens=(8, 192),
            padding_prompts=32,
            padding_batch_size=8,
            padding_repeats=3,
            dynamic_prompts=40,
            load_s=40.0,
            prefill_tokens=512,
            time_budget_s=900.0,
        )

    @property
    def mean_varied_tokens(self) -> float:
        """Of a prompt of parts 4, 5 and 6, on average."""
        low, high = self.varied_tokens
        return (high + 1 - low) / math.log((high + 1) / low)

    def to_dict(self) -> dict[str, Any]:
        """All sizes, ready for JSON."""
        values = asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a model is here, from a few tokens: good for a plan, not for a report."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    """Alone."""
    batched_tokens_per_s: float
    """With all slots; the same as alone where the model is so slow that it was not tried."""

    def alone_s(self, num: int, prompt: float, output: float) -> float:
        """One request after another."""
        return num * (prompt / self.prefill_tokens_per_s + output / self.decode_tokens_per_s)

    def batched_s(self, num: int, prompt: float, output: float) -> float:
        """Batched."""
        return num * (prompt / self.prefill_tokens_per_s + output / self.batched_tokens_per_s)


def estimate_s(config: LabConfig, rates: Rates) -> float:
    """About how long all parts take."""
    c = config
    sweep = sum(
        (rates.batched_s if size >= 4 else rates.alone_s)(
            size, c.prompt_tokens + 4, c.short_max_tokens + 2
        )
        for size in c.batch_sizes
    )
    # Outputs are between a quarter of the longest and it; a static batch waits for the longest.
    mean, longest = 0.625, 0.9
    padding = rates.batched_s(
        c.padding_prompts, c.mean_varied_tokens, mean * c.short_max_tokens / _small_batch_rate(c)
    )
    static, continuous = (
        rates.batched_s(c.dynamic_prompts, c.mean_varied_tokens, share * c.max_tokens)
        for share in (longest, mean)
    )
    request_s = continuous / c.dynamic_prompts
    load = sum(
        max(c.load_s, c.min_load_requests * request_s / fraction) + c.max_num_seqs * request_s
        for fraction in c.load_fractions
    )
    return (
        c.repeats * rates.alone_s(c.num_prompts + 1, c.prompt_tokens, c.max_tokens)
        + c.repeats * rates.batched_s(c.num_prompts, c.prompt_tokens, c.max_tokens)
        + (c.sweep_repeats + 1) * sweep  # once more for the roofline
        + c.padding_repeats * 5 * padding
        + c.repeats * (static + continuous)
        + load
        + 2 * c.prefill_tokens / rates.prefill_tokens_per_s
        + _PEAKS_S
    )


def fit_to_budget(config: LabConfig, rates: Rates) -> LabConfig:
    """The same with fewer tokens, so that it ends within its time budget.

    Where the least sensible numbers of tokens still take longer, repetitions and the large batch
    sizes go too; what is left then takes as long as it takes.
    """
    for scale in _SCALES:
        found = _scaled(config, scale)
        if estimate_s(found, rates) <= config.time_budget_s:
            return found
    least = _scaled(config, _SCALES[-1])
    return replace(
        least,
        repeats=1,
        sweep_repeats=1,
        padding_repeats=1,
        batch_sizes=tuple(size for size in config.batch_sizes if size <= 8) or config.batch_sizes,
        padding_prompts=min(config.padding_prompts, 2 * config.padding_batch_size),
        dynamic_prompts=min(config.dynamic_prompts, 2 * config.max_num_seqs),
        min_load_requests=min(config.min_load_requests, 4),
    )


def fit_to_context(config: LabConfig, max_tokens: int) -> LabConfig:
    """The same with no sequence longer than `max_tokens`.

    Raises:
        ConfigError: That is too short for anything.
    """
    half = max_tokens // 2
    if half < 2:
        raise ConfigError(f"the lab needs sequences of more than {max_tokens} tokens")
    low, high = config.varied_tokens
    return replace(
        config,
        prompt_tokens=min(config.prompt_tokens, half),
        max_tokens=min(config.max_tokens, half),
        short_max_tokens=min(config.short_max_tokens, half),
        varied_tokens=(min(low, half), min(high, half)),
        prefill_tokens=min(config.prefill_tokens, max_tokens - 1),
    )


def _small_batch_rate(config: LabConfig) -> float:
    """How much slower the batches of part 4 are than those of the rates."""
    return 0.75 if config.padding_batch_size < config.max_num_seqs else 1.0


def _scaled(config: LabConfig, scale: float) -> LabConfig:
    def cut(value: int, least: int) -> int:
        return min(value, max(least, round(value * scale)))

    low, high = config.varied_tokens
    return replace(
        config,
        prompt_tokens=cut(config.prompt_tokens, 8),
        max_tokens=cut(config.max_tokens, 8),
        short_max_tokens=cut(config.short_max_tokens, 8),
        varied_tokens=(cut(low, 4), cut(high, 16)),
        prefill_tokens=cut(config.prefill_tokens, 64),
        repeats=cut(config.repeats, 3),
        sweep_repeats=cut(config.sweep_repeats, 2),
        padding_repeats=cut(config.padding_repeats, 2),
        load_s=config.load_s * max(scale, _LEAST_LOAD_SCALE),
        scale=config.scale * scale,
    )
