"""Deadlines and shedding: how much work is in time, when there is more than can be done?

Simulated. Every request has a time by which its caller wants all of it, and is of no use after.
Three ways to treat that, from half to three times what the engine can serve: the engine isn't told
and serves in the order of arrival; it is told, so that the earliest deadline goes first and what is
late is dropped (`timeout`); and it refuses at once who would wait too long (`shed=True`).

    python benchmarks/studies/deadlines.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore import SchedulingPolicy
from batchcore.bench.arrivals import generators
from batchcore.lab.plot_style import plain
from batchcore.simulation import Trace, simulate
from common import (
    CHAT,
    GPU,
    GPU_OPTIONS,
    PALETTE,
    Study,
    capacity_per_s,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from batchcore.simulation import SimEngineOptions
    from matplotlib.figure import Figure

DURATION_S = 180.0
LOADS = (0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0)
PATIENCE_S = (4.0, 20.0)
NOT_TOLD, TOLD, SHED = "not told", "timeouts", "timeouts and shedding"


def main() -> None:
    """Run the three at every load."""
    study = Study("deadlines", __doc__)
    capacity = capacity_per_s(GPU, GPU_OPTIONS, CHAT)
    study.document |= {
        "device": GPU.to_dict(),
        "capacity_requests_per_s": round(capacity, 2),
        "patience_s": PATIENCE_S,
    }
    rows: list[dict[str, Any]] = []
    for factor in LOADS:
        drawn = Trace.poisson(factor * capacity, DURATION_S, seed=study.seed, **CHAT)
        (rng,) = generators(study.seed + 1, 1)
        patience = rng.uniform(*PATIENCE_S, len(drawn))
        for name in (NOT_TOLD, TOLD, SHED):
            trace = drawn.replaced(timeout_s=math.inf if name == NOT_TOLD else patience)
            policy = SchedulingPolicy(shed=name == SHED)
            options: SimEngineOptions = {**GPU_OPTIONS, "policy": policy}
            result = simulate(trace, GPU, **options)
            good = result.is_completed & (result.latency_s <= patience)
            lost = ~good & ~result.is_refused
            rows.append(
                {
                    "load": factor,
                    "engine": name,
                    "goodput (requests/s)": float(good.sum()) / DURATION_S,
                    "in time (%)": 100 * float(good.mean()),
                    "refused at once (%)": 100 * float(result.is_refused.mean()),
                    "given up late (%)": 100 * float(lost.mean()),
                    "tokens for nothing (%)": _wasted(result.num_output_tokens, good),
                    "p95 wait until it failed (s)": result.percentile(
                        np.minimum(result.latency_s, patience), 95, ~good
                    ),
                    "p95 TTFT of the good (s)": result.percentile(result.ttft_s, 95, good),
                }
            )
    study.table("Deadlines and shedding", "rows", rows)
    study.finish(lambda: draw(rows, capacity))


def _wasted(tokens: Any, good: Any) -> float:
    return 100 * float(tokens[~good].sum()) / max(1, int(tokens.sum()))


def draw(rows: list[dict[str, Any]], capacity: float) -> Figure:
    """Goodput, and how long those wait who get nothing."""
    figure, (left, middle, right) = new_figure(3.4, 1, 3)
    for axes, title, key in (
        (left, "Goodput", "goodput (requests/s)"),
        (middle, "Tokens for nothing", "tokens for nothing (%)"),
        (right, "Wait of who gets nothing", "p95 wait until it failed (s)"),
    ):
        plain(axes, title)
        for name, colour, line in zip(
            (NOT_TOLD, TOLD, SHED), PALETTE, ("--", "-", "-"), strict=False
        ):
            mine = [row for row in rows if row["engine"] == name]
            values = [math.nan if row[key] is None else row[key] for row in mine]
            axes.plot([row["load"] for row in mine], values, line, color=colour, label=name)
        axes.set_xlabel("load / capacity")
        axes.set_xticks(np.arange(0.5, 3.1, 0.5))
    left.axhline(capacity, color=PALETTE[4], linewidth=1, linestyle=":", label="capacity")
    left.set_ylim(0, None)
    left.set_ylabel("requests/s in time")
    middle.set_ylim(0, 100)
    middle.set_ylabel("% of output tokens")
    right.set_ylim(-0.5, None)
    right.set_ylabel("p95 (s)")
    legend_below(figure, left, 4)
    return figure


if __name__ == "__main__":
    main()
