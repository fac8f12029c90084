"""What is exported for Prometheus: every metric with its name, its meaning and where it is read.

Knows nothing of `prometheus_client`. Names are vLLM's where it has one, behind a prefix of our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, TypeAlias

from batchcore.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from batchcore.stats import EngineStats, LatencyStats

__all__ = ["FAMILIES", "OTHER_TIER", "PREFIX", "Buckets", "Family", "HistogramFamily", "Reading"]

PREFIX = "batchcore:"
OTHER_TIER = "other"
"""The tier of priorities that the policy has no name for. One value for all of them: priorities may
come from clients, and every value of a label is a series that Prometheus keeps."""

Samples: TypeAlias = "Iterable[tuple[tuple[str, ...], float]]"


@dataclass(frozen=True, slots=True)
class Reading:
    """One engine at one scrape."""

    stats: EngineStats
    tiers: Mapping[int, str]
    """Names of its tiers by priority."""


@dataclass(frozen=True, slots=True)
class Family:
    """A gauge or a counter."""

    name: str
    """As a query names it, without the prefix."""
    kind: Literal["gauge", "counter"]
    help: str
    read: Callable[[Reading], Samples]
    """Values of `labels`, and the value."""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Buckets:
    """Which edges of the engine's 232 buckets are exported, lowest first."""

    indices: tuple[int, ...]
    """Into `Histogram.bounds()`: the values below the edge are counted."""
    bounds: tuple[float, ...]
    """What Prometheus is told: the values up to and including this."""

    def cumulative(self, histogram: Histogram) -> list[tuple[str, float]]:
        """Values at or below each bound, and at last all of them."""
        sums = [0, *accumulate(histogram.counts)]
        last = len(sums) - 1  # the counts end with the last bucket that has any
        pairs: list[tuple[str, float]] = [
            (str(bound), sums[min(index, last)])
            for bound, index in zip(self.bounds, self.indices, strict=True)
        ]
        return [*pairs, ("+Inf", sums[last])]


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """A distribution."""

    name: str
    """As a query names it, without the prefix and without `_bucket`, `_sum` and `_count`."""
    help: str
    buckets: Buckets
    read: Callable[[EngineStats], Histogram]

    @property
    def kind(self) -> Literal["histogram"]:
        """As Prometheus calls it."""
        return "histogram"

    @property
    def labels(self) -> tuple[str, ...]:
        """None of its own."""
        return ()


def _half_octaves(low: int, high: int) -> list[float]:
    """2^low, 1.5 * 2^low, 2^(low + 1) and so on, up to 2^high."""
    steps = [part * 2.0**exponent for exponent in range(low, high) for part in (1.0, 1.5)]
    return [*steps, 2.0**high]


def _buckets(edges: list[float], *, whole: bool = False) -> Buckets:
    bounds = Histogram.bounds()
    # What lies beyond the range is counted in the buckets at its ends, so the last edge would lie.
    assert edges[-1] < bounds[-1]
    return Buckets(
        # Only edges that are there exactly: whatever else would have to be guessed.
        indices=tuple(bounds.index(edge) for edge in edges),
        # Below 8 is up to 7 where values are whole. Of seconds, none is ever exactly on an edge.
        bounds=tuple(edge - 1 if whole else edge for edge in edges),
    )


def _seconds(name: str, text: str, low: int, high: int, read: _OfLatencies) -> HistogramFamily:
    return HistogramFamily(
        name, text, _buckets(_half_octaves(low, high)), lambda stats: read(stats.latencies)
    )


def _gauge(name: str, text: str, read: Callable[[EngineStats], float]) -> Family:
    return Family(name, "gauge", text, lambda reading: [((), read(reading.stats))])


def _counter(name: str, text: str, read: Callable[[EngineStats], float]) -> Family:
    return Family(name, "counter", text, lambda reading: [((), read(reading.stats))])


def _labelled(
    name: str,
    kind: Literal["gauge", "counter"],
    text: str,
    label: str,
    read: Callable[[EngineStats], Mapping[str, float]],
) -> Family:
    return Family(
        name,
        kind,
        text,
        lambda reading: [((value,), count) for value, count in read(reading.stats).items()],
        (label,),
    )


def _by_tier(name: str, text: str, *, waiting: bool) -> Family:
    def read(reading: Reading) -> Samples:
        # Tiers without requests are not in the counters, but a series should not come and go.
        counts = dict.fromkeys([*reading.tiers.values(), OTHER_TIER], 0)
        for tier in reading.stats.tiers:
            label = reading.tiers.get(tier.priority, OTHER_TIER)
            counts[label] += tier.num_waiting if waiting else tier.num_running
        return [((label,), count) for label, count in counts.items()]

    return Family(name, "gauge", text, read, ("tier",))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_OfLatencies: TypeAlias = "Callable[[LatencyStats], Histogram]"

FAMILIES: tuple[Family | HistogramFamily, ...] = (
    # -- vLLM's names --
    _gauge("num_requests_running", "Sequences that hold a slot.", lambda s: s.num_running),
    _gauge("num_requests_waiting", "Sequences in the queue.", lambda s: s.num_waiting),
    _gauge(
        "kv_cache_usage_perc",
        "Share of the KV cells that running sequences hold, 0 to 1.",
        lambda s: _share(s.num_active_cells, s.num_cells),
    ),
    _counter(
        "prefix_cache_queries_total",
        "Prompt tokens that were looked up in the prefix cache.",
        lambda s: s.num_prompt_tokens,
    ),
    _counter(
        "prefix_cache_hits_total",
        "Prompt tokens that a cached prefix saved.",
        lambda s: s.num_cached_tokens,
    ),
    _counter(
        "num_preemptions_total",
        "Sequences that had to give way.",
        lambda s: s.num_preemptions,
    ),
    _counter(
        "prompt_tokens_total", "Prompt tokens of admitted requests.", lambda s: s.num_prompt_tokens
    ),
    _counter("generation_tokens_total", "Tokens generated.", lambda s: s.num_generated_tokens),
    _counter(
        "spec_decode_num_draft_tokens_total",
        "Tokens that speculation guessed and verified.",
        lambda s: s.num_draft_tokens,
    ),
    _counter(
        "spec_decode_num_accepted_tokens_total",
        "Guessed tokens that were right.",
        lambda s: s.num_accepted_tokens,
    ),
    HistogramFamily(
        "iteration_tokens_total",
        "Tokens that a step computed.",
        _buckets(_half_octaves(1, 12), whole=True),
        lambda s: s.step_tokens,
    ),
    _labelled(
        "request_success_total",
        "counter",
        "Requests that ended, by terminal state: stop, length, cancelled, timeout or error.",
        "finished_reason",
        lambda s: s.num_finished,
    ),
    _seconds("time_to_first_token_seconds", "Submit to first token.", -8, 8, lambda x: x.ttft),
    _seconds(
        "inter_token_latency_seconds",
        "A token to the next one of the same completion.",
        -10,
        3,
        lambda x: x.itl,
    ),
    _seconds(
        "e2e_request_latency_seconds",
        "Submit to end, of requests that ended with stop or length.",
        -6,
        11,
        lambda x: x.e2e,
    ),
    _seconds("request_queue_time_seconds", "Submit to first slot.", -10, 9, lambda x: x.queue),
    # -- load and limits --
    _by_tier("num_requests_running_by_tier", "Sequences that hold a slot, by tier.", waiting=False),
    _by_tier("num_requests_waiting_by_tier", "Sequences in the queue, by tier.", waiting=True),
    _gauge("batch_size_limit", "Sequences that may run now.", lambda s: s.batch_size_limit),
    _gauge(
        "batch_fill_ratio",
        "Sequences that run, of those that may, 0 to 1.",
        lambda s: _share(s.num_running, s.batch_size_limit),
    ),
    _labelled(
        "batch_size_changes_total",
        "counter",
        "Decisions of max_num_seqs=auto to run more sequences (up) or fewer (down).",
        "direction",
        lambda s: {"up": s.num_batch_size_increases, "down": s.num_batch_size_decreases},
    ),
    _counter(
        "requests_refused_total", "Requests refused with QueueFullError.", lambda s: s.num_refused
    ),
    _counter(
        "requests_shed_total",
        "Refused requests that would have waited longer than their timeout.",
        lambda s: s.num_shed,
    ),
    _gauge("paused", "1 while the engine is paused.", lambda s: s.is_paused),
    _gauge("draining", "1 while the engine takes no more requests.", lambda s: s.is_draining),
    _gauge(
        "num_active_users", "Users with requests that wait or run.", lambda s: s.num_active_users
    ),
    _labelled(
        "fair_share_service_tokens_total",
        "counter",
        "What users were charged, in tokens by their cost, by a hash of the name.",
        "user_bucket",
        lambda s: {str(bucket): charged for bucket, charged in enumerate(s.service)},
    ),
    # -- memory --
    _gauge("kv_cache_cells", "KV cells in all.", lambda s: s.num_cells),
    _gauge("kv_cache_active_cells", "KV cells of running sequences.", lambda s: s.num_active_cells),
    _gauge(
        "kv_cache_cached_cells",
        "KV cells kept for the prefix they hold; free for whoever needs them.",
        lambda s: s.num_cached_cells,
    ),
    _gauge("num_pinned_prefixes", "Prefixes that warm() keeps.", lambda s: s.num_pinned),
    _counter(
        "prefix_cache_evictions_total",
        "Cached prefixes given up for their cells or slot.",
        lambda s: s.num_evictions,
    ),
    _counter(
        "prefix_cache_host_hits_total",
        "Prompt tokens that came back from host memory.",
        lambda s: s.num_host_tokens,
    ),
    _gauge("host_cache_bytes", "Host memory of evicted prefixes.", lambda s: s.host_cache_bytes),
    _gauge("preempted_saved_bytes", "Host memory of preempted sequences.", lambda s: s.saved_bytes),
    _counter(
        "num_preemptions_saved_total",
        "Preemptions into host memory; the others are computed again.",
        lambda s: s.num_saves,
    ),
    _counter(
        "num_preemptions_for_slot_total",
        "Preemptions for a request of a better tier that needed the slot.",
        lambda s: s.num_slot_preemptions,
    ),
    _counter(
        "num_slot_moves_total",
        "Running sequences moved into a gap between others (streams).",
        lambda s: s.num_slot_moves,
    ),
    # -- work, and what of it is wasted --
    _counter("steps_total", "Steps that computed something.", lambda s: s.num_steps),
    _counter("decode_calls_total", "Calls of llama.cpp's decode.", lambda s: s.num_micro_batches),
    _labelled(
        "step_seconds_total",
        "counter",
        "Seconds of the engine thread: plan, decode (inside llama.cpp), sample, text or publish.",
        "phase",
        lambda s: {
            "plan": s.plan_s,
            "decode": s.decode_s,
            "sample": s.sample_s,
            "text": s.text_s,
            "publish": s.publish_s,
        },
    ),
    _labelled(
        "computed_rows_total",
        "counter",
        "Rows computed: prompt tokens (prefill), decoding sequences and drafts (decode), filler.",
        "kind",
        lambda s: {
            "prefill": s.num_prefill_tokens,
            "decode": s.num_decode_rows,
            "filler": s.padding.num_filler_rows,
        },
    ),
    _labelled(
        "padding_waste_ratio",
        "gauge",
        "Share computed for nothing since the start: slot, attention or shape.",
        "kind",
        lambda s: {
            "slot": s.padding.slot_waste,
            "attention": s.padding.attention_waste,
            "shape": s.padding.shape_waste,
        },
    ),
    _labelled(
        "attention_positions_total",
        "counter",
        "Key positions that rows attended to (needed), and that attention went over (computed).",
        "kind",
        lambda s: {
            "needed": s.padding.attention_needed,
            "computed": s.padding.attention_computed,
        },
    ),
    _labelled(
        "static_slot_steps_total",
        "counter",
        "Steps of slots of static batches: busy or idle.",
        "kind",
        lambda s: {"busy": s.padding.busy_slot_steps, "idle": s.padding.idle_slot_steps},
    ),
    # -- trouble --
    _counter("decode_failures_total", "Decode calls that failed.", lambda s: s.num_decode_failures),
    _counter(
        "decode_interrupts_total",
        "Decode calls cut short because all of it was cancelled.",
        lambda s: s.num_interrupts,
    ),
    _counter(
        "context_rebuilds_total",
        "Contexts set up anew after the device had failed.",
        lambda s: s.num_rebuilds,
    ),
)
