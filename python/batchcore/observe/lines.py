"""From counters and requests to what a log line says: values, ready for JSON, and a text."""

from __future__ import annotations

import math
import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from batchcore.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchcore.handle import FinishedRequest
    from batchcore.stats import EngineStats

__all__ = ["interval_line", "interval_values", "request_line", "request_values"]


def interval_values(
    before: EngineStats | None, now: EngineStats, interval_s: float
) -> dict[str, Any] | None:
    """What happened between two looks at an engine; None where nothing did.

    Rates are per second. What has no value (a percentile of nothing) is None.
    """

    def growth(read: Callable[[EngineStats], int]) -> int:
        return read(now) - (0 if before is None else read(before))

    num_steps = growth(lambda s: s.num_steps)
    num_finished = {
        reason: count - (0 if before is None else before.num_finished.get(reason, 0))
        for reason, count in now.num_finished.items()
    }
    num_refused = growth(lambda s: s.num_refused)
    is_busy = now.num_running > 0 or now.num_waiting > 0
    if not (is_busy or num_steps or num_refused or any(num_finished.values())):
        return None
    prompt_tokens = growth(lambda s: s.num_prompt_tokens)
    generated_tokens = growth(lambda s: s.num_generated_tokens)
    earlier = before.latencies if before is not None else None
    ttft = _since(earlier.ttft if earlier else None, now.latencies.ttft)
    itl = _since(earlier.itl if earlier else None, now.latencies.itl)
    return {
        "event": "stats",
        "interval_s": interval_s,
        "num_running": now.num_running,
        "num_waiting": now.num_waiting,
        "prompt_tokens_per_s": _ratio(prompt_tokens, interval_s),
        "generated_tokens_per_s": _ratio(generated_tokens, interval_s),
        "kv_cache_usage": _ratio(now.num_active_cells, now.num_cells),
        "prefix_hit_rate": _ratio(growth(lambda s: s.num_cached_tokens), prompt_tokens),
        "ttft_p50_s": _quantile(ttft, 0.5),
        "ttft_p95_s": _quantile(ttft, 0.95),
        "itl_p50_s": _quantile(itl, 0.5),
        "itl_p95_s": _quantile(itl, 0.95),
        "num_finished": num_finished,
        "num_refused": num_refused,
        "num_preemptions": growth(lambda s: s.num_preemptions),
        "num_steps": num_steps,
    }


def interval_line(values: dict[str, Any]) -> str:
    """The same for people."""
    finished = sum(values["num_finished"].values())
    return (
        f"running {values['num_running']}, waiting {values['num_waiting']}, "
        f"prompt {_number(values['prompt_tokens_per_s'])} tokens/s, "
        f"generated {_number(values['generated_tokens_per_s'])} tokens/s, "
        f"KV {_percent(values['kv_cache_usage'])}, "
        f"prefix hits {_percent(values['prefix_hit_rate'])}, "
        f"TTFT p50 {_ms(values['ttft_p50_s'])} p95 {_ms(values['ttft_p95_s'])}, "
        f"ITL p50 {_ms(values['itl_p50_s'])} p95 {_ms(values['itl_p95_s'])}, "
        f"finished {finished}, refused {values['num_refused']}, "
        f"preempted {values['num_preemptions']}"
    )


def request_values(event: FinishedRequest) -> dict[str, Any]:
    """One request: times in seconds, counts, who asked, how it ended. No prompt and no output."""
    submission, output, metrics = event.submission, event.output, event.output.metrics
    priority = submission.priority
    return {
        "event": "slow_request",
        "request_id": output.request_id,
        # A handle that was dropped has not seen the engine's times: it ends now.
        "latency_s": metrics.latency_s if metrics else max(0.0, time.time() - event.submitted_at),
        "queue_s": metrics.queue_s if metrics else None,
        "ttft_s": metrics.ttft_s if metrics else None,
        "tpot_s": metrics.tpot_s if metrics else None,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "num_output_tokens": sum(len(each.token_ids) for each in output.outputs),
        "num_preemptions": metrics.num_preemptions if metrics else None,
        "user": _printable(submission.user),
        "priority": _printable(priority) if isinstance(priority, str) else priority,
        "finish_reasons": [each.finish_reason for each in output.outputs],
        "error": type(event.error).__name__ if event.error is not None else None,
    }


def request_line(values: dict[str, Any]) -> str:
    """The same for people. What callers chose is in quotes, so that it can't pass for more."""
    reasons = "+".join(str(reason) for reason in values["finish_reasons"])
    error = f" ({values['error']})" if values["error"] else ""
    return (
        f"slow request {values['request_id']}: {values['latency_s']:.3f} s "
        f"(queue {_seconds(values['queue_s'])}, first token {_seconds(values['ttft_s'])}), "
        f"{values['num_prompt_tokens']} prompt tokens ({values['num_cached_tokens']} cached), "
        f"{values['num_output_tokens']} generated, user {_quoted(values['user'])}, "
        f"priority {_quoted(values['priority'])}, ended with {reasons}{error}, "
        f"preempted {_number(values['num_preemptions'], digits=0)} times"
    )


def _since(before: Histogram | None, now: Histogram) -> Histogram:
    if before is None:
        return now
    pairs = zip_longest(now.counts, before.counts, fillvalue=0)
    return Histogram(tuple(a - b for a, b in pairs), now.sum - before.sum)


def _quantile(histogram: Histogram, share: float) -> float | None:
    value = histogram.quantile(share)
    return None if math.isnan(value) else value  # JSON has no NaN


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _printable(text: str) -> str:
    """Printable ASCII only: names come from clients, and no line break or escape may get through.

    Different names stay different, and lone surrogates don't make a JSON handler fail.
    """
    return text.encode("unicode_escape").decode("ascii")


def _quoted(value: str | int) -> str:
    """Numbers as they are; text, which is printable by now, between quotes that it can't close."""
    return str(value) if isinstance(value, int) else '"' + value.replace('"', r"\x22") + '"'


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"
