"""How a run is written down, and what several of them say together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchcore.bench.compare import compare_pairs
from batchcore.bench.runners import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchcore.bench.monitor import MonitorResult
    from batchcore.bench.runners import RunResult
    from batchcore.stats import EngineStats

    Run = dict[str, Any]

__all__ = [
    "Watched",
    "complete",
    "median_run",
    "median_watched",
    "paired",
    "run_figures",
    "without_nan",
]

_MAX_SAMPLES = 400
_MEANS = {
    "mean_running": "num_running",
    "process_cpu_percent": "process_cpu_percent",
    "system_cpu_percent": "system_cpu_percent",
    "gpu_utilisation_percent": "gpu0_utilisation_percent",
    "gpu_memory_busy_percent": "gpu0_memory_busy_percent",
}


@dataclass(frozen=True)
class Watched:
    """A run and what was seen of it."""

    run: Run
    monitor: MonitorResult
    before: EngineStats
    after: EngineStats

    def thinned_monitor(self) -> dict[str, Any]:
        """Samples ready for JSON, every n-th of them where they are many."""
        values = self.monitor.to_dict()
        stride = -(-len(self.monitor) // _MAX_SAMPLES) or 1
        values["columns"] = {name: each[::stride] for name, each in values["columns"].items()}
        return {**values, "every_nth_sample": stride}

    def utilisation(self, num_slots: int) -> dict[str, Any]:
        """How busy slots and processors were; None where that can't be read."""
        steps, calls, rows = (
            getattr(self.after, name) - getattr(self.before, name)
            for name in ("num_steps", "num_micro_batches", "num_rows")
        )
        total_s = self.run["total_s"]
        summary = self.monitor.summary
        means = {
            name: summary[column].mean if column in summary else None
            for name, column in _MEANS.items()
        }
        rss = summary.get("process_rss_bytes")
        return {
            "num_steps": steps,
            "rows_per_call": rows / calls if calls else None,
            "slot_use": self.run["held_slots_s"] / (total_s * num_slots),
            "decode_share": (self.after.decode_s - self.before.decode_s) / total_s,
            "max_memory_bytes": None if rss is None else rss.max,
            **means,
        }


def complete(result: RunResult) -> RunResult:
    """The result, if it is of a whole run.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
    """
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def run_figures(result: RunResult) -> Run:
    """A run without its texts, ready for JSON."""
    values = result.to_dict()
    requests = values.pop("requests")
    num_prompt_tokens = sum(request["num_prompt_tokens"] for request in requests)
    ttfts_s = [request["ttft_s"] for request in requests if request["ttft_s"] is not None]
    num_tokens = num_prompt_tokens + result.num_output_tokens
    return {
        **values,
        "num_prompt_tokens": num_prompt_tokens,
        "total_tokens_per_s": num_tokens / result.total_s if result.total_s else 0.0,
        "ttft_s": {
            "mean": sum(ttfts_s) / len(ttfts_s) if ttfts_s else None,
            **{f"p{p}": percentile(ttfts_s, p) if ttfts_s else None for p in (50, 95)},
        },
        "held_slots_s": math.fsum(
            metrics.latency_s - (metrics.queue_s or 0.0)
            for request in result.requests
            if (metrics := request.output.metrics) is not None
        ),
        "latencies_s": result.latencies_s,
        "ttfts_s": ttfts_s,
    }


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose total time is the median; of an even number, the faster one in the middle.

    One real run: its figures fit together, which medians of each figure would not.
    """
    return sorted(runs, key=lambda run: run["total_s"])[(len(runs) - 1) // 2]


def median_watched(runs: Sequence[Watched]) -> Watched:
    """The same of runs that were watched."""
    middle = median_run([one.run for one in runs])
    return next(one for one in runs if one.run is middle)


def paired(baseline: Sequence[Run], candidate: Sequence[Run], *path: str) -> dict[str, Any]:
    """Candidate / baseline of one figure, round by round."""

    def value(run: Any) -> float:
        for name in path:
            run = run[name]
        return float(run)

    found = compare_pairs([value(run) for run in baseline], [value(run) for run in candidate])
    return {
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "values": list(found.ratios),
    }


def without_nan(value: Any) -> Any:
    """The same for JSON: None for what is not a finite number, lists for tuples."""
    if isinstance(value, dict):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
