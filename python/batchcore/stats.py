"""Counters of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from batchcore import _core

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EngineStats", "Histogram", "LatencyStats", "PaddingStats", "TierStats"]


@dataclass(frozen=True, slots=True)
class PaddingStats:
    """What batching wastes, counted call by call since the start."""

    busy_slot_steps: int
    """Of static batches: tokens that were generated."""
    idle_slot_steps: int
    """Of static batches: steps of slots whose sequence had ended while its batch went on."""
    attention_needed: int
    """Key positions that the rows attended to, summed over the layers that have any."""
    attention_computed: int
    """Key positions that attention went over.

    With batchcore's kernels: those of the row's own sequence, in blocks of 32. With ggml's: also
    other sequences' cells, empty cells and padding to 256.
    """
    num_rows: int
    """Rows computed."""
    num_filler_rows: int
    """Dummy rows among them: they bridge gaps between streams or fill a group of rows."""
    num_extra_outputs: int
    """Logits that were computed only for the shape."""

    @property
    def slot_waste(self) -> float:
        """Share of the slot steps of static batches that were idle; 0 without static batches."""
        return _share(self.idle_slot_steps, self.busy_slot_steps + self.idle_slot_steps)

    @property
    def attention_waste(self) -> float:
        """Share of the key positions that were gone over for nothing (ggml skips most quickly)."""
        return _share(self.attention_computed - self.attention_needed, self.attention_computed)

    @property
    def shape_waste(self) -> float:
        """Share of the rows that were dummies."""
        return _share(self.num_filler_rows, self.num_rows)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in buckets, each an eighth of a power of two wide.

    A quantile is off by at most a sixteenth of its value. Values below 15e-6 or above 8192 count
    into the first and last bucket.
    """

    counts: tuple[int, ...]
    """By bucket; those beyond the end are empty."""
    sum: float
    """Of all values."""

    @classmethod
    def from_native(cls, values: tuple[float, tuple[int, ...]]) -> Self:
        """From the C++ engine."""
        return cls(values[1], values[0])

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.sum / self.count if self.counts else math.nan

    @staticmethod
    def bounds() -> tuple[float, ...]:
        """Bucket b holds values from `bounds()[b]` up to, not including, `bounds()[b + 1]`."""
        return _core.histogram_bounds

    def quantile(self, share: float) -> float:
        """The middle of the bucket that holds the value at `share` (0..1); NaN without values."""
        rank = max(1, math.ceil(share * self.count))
        bounds = self.bounds()
        for bucket, upto in enumerate(accumulate(self.counts)):
            if upto >= rank:
                return (bounds[bucket] + bounds[bucket + 1]) / 2
        return math.nan


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Distributions of seconds, since the start."""

    queue: Histogram
    """From submit to the first slot."""
    ttft: Histogram
    """From submit to the first token."""
    itl: Histogram
    """From a token to the next one of the same completion."""
    e2e: Histogram
    """From submit to the end, of requests that ended with `stop` or `length`."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Sequences that came with one priority, now."""

    priority: int
    num_waiting: int
    num_running: int


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine at the end of a step."""

    num_running: int
    """Sequences that hold a slot."""
    num_waiting: int
    """Sequences in the queue."""
    num_cells: int
    """KV cells in all."""
    num_active_cells: int
    """KV cells of running sequences; shared ones count once."""
    num_cached_cells: int
    """KV cells kept for the prefix they hold."""
    num_pinned: int
    """Prefixes that `warm` keeps."""
    saved_bytes: int
    """Host memory that preempted sequences take."""
    host_cache_bytes: int
    """Host memory that evicted prefixes take."""
    step_decode_rows: int
    """Of the last step: rows of sequences that decoded,"""
    step_prefill_tokens: int
    """prompt tokens,"""
    step_s: float
    """seconds inside llama.cpp."""
    cost_s: tuple[float, float, float, float]
    """Predicted seconds of a decode call: once, per prompt token, per sequence that decodes, per KV
    token that a row attends to."""
    num_steps: int
    num_micro_batches: int
    """Calls of llama.cpp's decode."""
    num_rows: int
    """Rows computed in all of them."""
    num_prompt_tokens: int
    """Prompt tokens of the requests that were admitted."""
    num_prefill_tokens: int
    """Tokens computed in chunks; again after a preemption."""
    num_decode_rows: int
    """Rows of sequences that decode: one per sequence and step, and those of its drafts."""
    num_draft_tokens: int
    """Tokens that speculation guessed and verified."""
    num_accepted_tokens: int
    """Those of them that were right, and so saved a step of their sequence."""
    num_cached_tokens: int
    """Prompt tokens that a cached prefix saved."""
    num_host_tokens: int
    """Those of them that came back from host memory."""
    num_generated_tokens: int
    num_preemptions: int
    num_saves: int
    """Preemptions into host memory; the others are computed again."""
    num_evictions: int
    """Cached prefixes given up for their cells or their slot."""
    num_decode_failures: int
    num_interrupts: int
    """Decode calls cut short because all that they computed was cancelled."""
    num_rebuilds: int
    """Contexts set up anew after the device had failed."""
    num_graphs_reused: int
    """Decode calls that reused the compute graph of the one before."""
    num_finished: dict[str, int]
    """Requests by terminal state."""
    plan_s: float
    """Seconds of the engine thread by phase, since the start: planning,"""
    decode_s: float
    """inside llama.cpp,"""
    sample_s: float
    """choosing tokens,"""
    text_s: float
    """turning them into text, looking for stop strings, bookkeeping,"""
    publish_s: float
    """handing results out."""
    is_paused: bool
    is_draining: bool
    num_active_users: int
    """Users with requests that wait or run."""
    num_known_users: int
    """Those and the ones whose past use is remembered."""
    batch_size_limit: int
    """Sequences that may run now: `max_num_seqs`, or with `auto` what the engine decided."""
    batch_size_knee: int
    """Sequences beyond which throughput is predicted to gain little."""
    num_batch_size_increases: int
    """With `auto`: decisions to run one more, because tokens come faster than the target,"""
    num_batch_size_decreases: int
    """and to run a quarter less, because they come slower."""
    num_refused: int
    """Submits refused with QueueFullError,"""
    num_shed: int
    """and those of them that would have waited longer than their timeout."""
    num_slot_preemptions: int
    """Preemptions for a request of a better tier that needed a slot, not cells."""
    num_slot_moves: int
    """With `streams`: sequences that were moved next to the others, so that a call has no gaps."""
    service: tuple[float, ...]
    """What users were charged (prompt and output tokens by their cost), by a hash of the name."""
    tiers: tuple[TierStats, ...]
    """Best first; at most eight."""
    latencies: LatencyStats
    step_tokens: Histogram
    """Tokens that a step computed."""
    padding: PaddingStats
    """What was computed, or stood idle, for nothing."""
    variant_operations: tuple[str, ...]
    """What in the calls so far lets outputs depend on the load: `ggml kernels`, `matrix product`,
    `expert product`, `attention`, `linear attention`. Empty when nothing does."""

    @property
    def is_batch_invariant(self) -> bool | None:
        """Whether tokens and log-probabilities are the same to the bit whatever else is running.

        None until the engine has computed something.
        """
        return not self.variant_operations if self.num_micro_batches else None

    @classmethod
    def from_native(cls, counters: dict[str, Any]) -> Self:
        """From the counters of the C++ engine."""
        latencies = counters.pop("latencies")
        return cls(
            padding=PaddingStats(**counters.pop("padding")),
            tiers=tuple(TierStats(*tier) for tier in counters.pop("tiers")),
            latencies=LatencyStats(
                **{name: Histogram.from_native(values) for name, values in latencies.items()}
            ),
            step_tokens=Histogram.from_native(counters.pop("step_tokens")),
            **counters,
        )
