"""Part 6: requests that arrive over time, at rates around what the engine can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchcore.bench.load import run_load
from batchcore.bench.workload import Workload
from batchcore.lab.setup import warm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchcore.engine import Engine
    from batchcore.lab.setup import Lab

__all__ = ["measure_load"]

_NOTE = (
    "Arrivals are a Poisson process. The production scheduler's deadlines, tiers and fair share "
    "are not in this version; this is the engine as it is. Capacity is what the continuous run of "
    "part 5 finished per second."
)
_MAX_REQUESTS = 1000


def measure_load(lab: Lab, done: Mapping[str, Any]) -> dict[str, Any]:
    """Run a Poisson load at several fractions of the capacity that part 5 has shown."""
    c = lab.config
    continuous = done["dynamic"]["continuous"]
    capacity = continuous["num_requests"] / continuous["total_s"]
    longest = c.varied_tokens[1] + c.max_tokens
    loads = []
    with lab.engine(c.max_num_seqs, longest) as engine:
        warm(engine, lab.prompts(c.max_num_seqs, c.varied_tokens[0], seed_offset=3))
        for index, fraction in enumerate(c.load_fractions):
            note = f"{100 * fraction:.0f}% of {capacity:.2f} requests/s"
            lab.on_step(index / len(c.load_fractions), note)
            loads.append(_measure_one(lab, engine, fraction, fraction * capacity))
    return {
        "scheduler": {"loads": loads, "capacity_requests_per_s": capacity, "note": _NOTE},
    }


def _measure_one(lab: Lab, engine: Engine, fraction: float, request_rate: float) -> dict[str, Any]:
    c = lab.config
    count = round(request_rate * c.load_s)
    workload = Workload.generate(
        lab.model,
        num_prompts=min(max(count, c.min_load_requests), _MAX_REQUESTS),
        prompt_tokens=lab.varied_distribution,
        output_tokens=f"uniform:{max(1, c.max_tokens // 4)}:{c.max_tokens}",
        request_rate=request_rate,
        seed=lab.config.seed + 3,
    )
    result = run_load(engine, workload)
    if result.interrupted:
        raise KeyboardInterrupt
    summary = result.summarize()
    return {
        "request_rate": request_rate,
        "capacity_fraction": fraction,
        "num_requests": len(workload),
        "arrivals_s": workload.duration_s,
        "summary": summary.to_metrics(),
        "errors": summary.errors,
        "num_refused": summary.errors.get("QueueFullError", 0),
        "latencies_s": [record.latency_s for record in result.records],
    }
