"""How fast is the simulation? An hour of a thousand requests per second through one engine.

Simulated: 3.6 million requests of a thousand users on a device as fast as a large GPU serving a
small model, 256 at a time. What is measured is the wall time that the simulation takes, and the
memory of its process.

    python benchmarks/studies/scale.py
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore.simulation import SimDevice, Trace, simulate
from common import Study

if TYPE_CHECKING:
    from batchcore.simulation import SimEngineOptions

RATE_PER_S = 1000.0
DURATIONS_S = (60.0, 600.0, 3600.0)
NUM_USERS = 1000
FAST = SimDevice(
    base_s=2e-3, prefill_token_s=2e-6, decode_row_s=8e-6, kv_token_s=1e-11, copied_token_s=1e-6
)
OPTIONS: SimEngineOptions = {
    "max_num_seqs": 256,
    "n_ctx": 131_072,
    "n_ubatch": 2048,
    "max_queued_requests": 100_000,
    "max_queued_tokens": 100_000_000,
}
LENGTHS: dict[str, Any] = {
    "prompt_tokens": "lognormal:80:0.6:5:400",
    "output_tokens": "lognormal:28:0.6:2:200",
}


def made_up(duration_s: float, seed: int) -> Trace:
    """Requests of users that are drawn evenly."""
    trace = Trace.poisson(RATE_PER_S, duration_s, seed=seed, **LENGTHS)
    rng = np.random.default_rng(seed + 1)
    return trace.replaced(
        user=rng.integers(NUM_USERS, size=len(trace)),
        users=[f"user-{number}" for number in range(NUM_USERS)],
    )


def main() -> None:
    """Simulate a minute, ten minutes and an hour."""
    study = Study("scale", __doc__)
    study.document["device"] = FAST.to_dict()
    rows: list[dict[str, Any]] = []
    for duration_s in DURATIONS_S:
        trace = made_up(duration_s, study.seed)
        start, busy = time.perf_counter(), time.process_time()
        result = simulate(trace, FAST, **OPTIONS)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - busy
        tokens = int(result.num_output_tokens.sum() + trace.num_prompt_tokens.sum())
        rows.append(
            {
                "simulated (s)": result.total_s,
                "requests": len(trace),
                "completed": int(result.is_completed.sum()),
                "tokens": tokens,
                "steps": result.stats.num_steps,
                "wall (s)": wall_s,
                "CPU (s)": cpu_s,
                "µs of CPU per request": 1e6 * cpu_s / len(trace),
                "peak memory of the process (MB)": _peak_mb(),
                "p95 TTFT (ms)": 1e3 * result.percentile(result.ttft_s, 95),
            }
        )
    study.table("An hour at 1,000 requests per second", "rows", rows)
    study.finish(None)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
