"""From the requests of a run to the figures that peers are compared by."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from batchcore.bench.metrics import summarize
from batchcore.bench.peers.base import Measurement, PeerError
from batchcore.bench.runners import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchcore.bench.load import LoadResult
    from batchcore.bench.metrics import RequestRecord
    from batchcore.bench.peers.workloads import Case

__all__ = ["METRICS", "decode_rate", "measure", "token_times_s"]

METRICS = {
    "output_tokens_per_s": "output tok/s",
    "decode_tokens_per_s": "decode tok/s",
    "full_decode_tokens_per_s": "with all",
    "prompt_tokens_per_s": "prompt tok/s",
    "total_s": "total s",
    "p50_ttft_ms": "TTFT p50 ms",
    "p95_ttft_ms": "TTFT p95 ms",
    "p50_itl_ms": "ITL p50 ms",
    "p95_itl_ms": "ITL p95 ms",
    "p99_itl_ms": "ITL p99 ms",
    "max_itl_ms": "ITL max ms",
    "num_failed": "failed",
    "peak_rss_bytes": "peak RSS MiB",
}
"""What tables show: names of figures, and what heads their columns."""


def measure(result: LoadResult, case: Case, peak_rss_bytes: int | None = None) -> Measurement:
    """Sum a run up.

    Raises:
        PeerError: No request gave anything; the message has the error of the first.
        KeyboardInterrupt: The run ended with Ctrl-C, and so is worth nothing.
    """
    if result.interrupted:
        raise KeyboardInterrupt
    summary = summarize(result.records, result.total_s, num_requests=result.num_requests)
    errors = [record.error_message or record.error for record in result.records if record.error]
    if summary.num_completed == 0:
        raise PeerError(errors[0] if errors and errors[0] else "no request was completed")
    waits = [record.ttft_s for record in _of(result.records, case.ttft_group) if record.ttft_s]
    gaps = [gap for record in _of(result.records, case.itl_group) for gap in record.itl_s]
    metrics: dict[str, float | None] = {
        "total_s": summary.total_s,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "requests_per_s": summary.requests_per_s,
        "decode_tokens_per_s": None,
        **_percentiles_ms("ttft", waits, (50, 95)),
        **_percentiles_ms("itl", gaps, (50, 95, 99)),
        "max_itl_ms": max(gaps) * 1e3 if gaps else None,
        "num_failed": summary.num_requests - summary.num_completed,
        "num_prompt_tokens": summary.num_prompt_tokens,
        "num_cached_tokens": summary.num_cached_tokens,
        "num_output_tokens": summary.num_output_tokens,
        "p99_lag_ms": summary.lag_s.p99 * 1e3,
        "peak_rss_bytes": peak_rss_bytes,
    }
    if all(request.params.max_tokens == 1 for request in case.workload):
        computed = summary.num_prompt_tokens - summary.num_cached_tokens
        metrics["prompt_tokens_per_s"] = computed / summary.total_s
    if case.decode_size is not None:
        metrics["decode_tokens_per_s"] = decode_rate(result.records)
        metrics["full_decode_tokens_per_s"] = decode_rate(result.records, until_first_end=True)
    return Measurement(metrics, {"errors": errors[:3]} if errors else {})


def token_times_s(record: RequestRecord) -> list[float]:
    """When each token of a request with one completion came, from the start of the run."""
    if record.ttft_s is None:
        return []
    return list(accumulate(record.itl_s, initial=record.due_s + record.ttft_s))


def decode_rate(records: Sequence[RequestRecord], *, until_first_end: bool = False) -> float | None:
    """Tokens per second once every sequence decodes, as llama-batched-bench counts (its S_TG).

    From when the last sequence got its first token: what came before and with it, is not counted.

    Args:
        records: Of requests that were submitted together.
        until_first_end: Stop when the first sequence has ended, so that all of them decode all the
            time; otherwise, when the last has.

    Returns:
        None where a sequence has no token, or nothing came in that time.
    """
    times = [token_times_s(record) for record in records]
    if not times or not all(times):
        return None
    start = max(one[0] for one in times)
    end = (min if until_first_end else max)(one[-1] for one in times)
    count = sum(start < at <= end for one in times for at in one)
    return count / (end - start) if count and end > start else None


def _of(records: Sequence[RequestRecord], group: str | None) -> list[RequestRecord]:
    return [
        record
        for record in records
        if record.is_completed and (group is None or record.group == group)
    ]


def _percentiles_ms(
    name: str, values: list[float], percents: tuple[int, ...]
) -> dict[str, float | None]:
    ordered = sorted(values)
    return {
        f"p{percent}_{name}_ms": percentile(ordered, percent) * 1e3 if ordered else None
        for percent in percents
    }
