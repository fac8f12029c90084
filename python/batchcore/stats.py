"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EngineStats", "PaddingStats"]


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
    """Those that attention went over: with other sequences' cells, holes and padding to 256."""
    num_rows: int
    """Rows computed."""
    num_filler_rows: int
    """Those of them that only gave a call a cheaper shape."""
    num_extra_outputs: int
    """Logits that were computed only for the shape."""

    @property
    def slot_waste(self) -> float:
        """Share of the slot steps of static batches that were idle; 0 without static batches."""
        return _share(self.idle_slot_steps, self.busy_slot_steps + self.idle_slot_steps)

    @property
    def attention_waste(self) -> float:
        """Share of the key positions that were gone over for nothing (CPUs skip most quickly)."""
        return _share(self.attention_computed - self.attention_needed, self.attention_computed)

    @property
    def shape_waste(self) -> float:
        """Share of the rows that were dummies."""
        return _share(self.num_filler_rows, self.num_rows)


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
    """Of the last step: sequences that decoded,"""
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
    """Tokens computed one per sequence and step."""
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
    padding: PaddingStats
    """What was computed, or stood idle, for nothing."""

    @classmethod
    def from_native(cls, counters: dict[str, Any]) -> Self:
        """From the counters of the C++ engine."""
        padding = PaddingStats(**counters.pop("padding"))
        return cls(**counters, padding=padding)
