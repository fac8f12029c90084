"""Tiers under overload: who is served when there is more to do than can be done?

Simulated. Three tiers of requests, from half to three times what the engine can serve: a fifth of
them interactive, half standard, the rest in the background, each tier of ten users. The engine's
defaults against the same without taking slots from worse tiers, without aging, with slots reserved
for the best tier, with no tiers at all, and with everybody under one name.

    python benchmarks/studies/tiers.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore import SchedulingPolicy, Tier
from batchcore.bench.metrics import Slo
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
    log_scale,
    new_figure,
    with_trace,
)

if TYPE_CHECKING:
    from batchcore.simulation import SimEngineOptions
    from matplotlib.figure import Figure

DURATION_S = 180.0
LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
# Name, priority, share of the requests, time to first token that counts as good.
TIERS = (
    ("interactive", -1, 0.2, 1.0),
    ("standard", 0, 0.5, 10.0),
    ("batch", 1, 0.3, 60.0),
)
_RESERVED = (Tier("interactive", -1, reserved_seqs=16), Tier("standard", 0), Tier("batch", 1))
USERS_PER_TIER = 10
NO_TIERS, ONE_USER = "no tiers", "defaults, one user"
POLICIES = {
    NO_TIERS: SchedulingPolicy(),
    "defaults": SchedulingPolicy(),
    "no slot preemption": SchedulingPolicy(preempt_for_slots=False),
    "no aging": SchedulingPolicy(aging_s=None),
    "16 slots reserved, no preemption": SchedulingPolicy(tiers=_RESERVED, preempt_for_slots=False),
    ONE_USER: SchedulingPolicy(),
}


def load(rate_per_s: float, seed: int) -> Trace:
    """All users of all tiers, each a Poisson process of its own."""
    return Trace.merged(
        *(
            Trace.poisson(
                share * rate_per_s / USERS_PER_TIER,
                DURATION_S,
                user=f"{name}-{number}",
                priority=priority,
                seed=seed + 1000 * number + priority + 1,
                **CHAT,
            )
            for name, priority, share, _ in TIERS
            for number in range(USERS_PER_TIER)
        )
    )


def main() -> None:
    """Run every policy at every load."""
    study = Study("tiers", __doc__)
    capacity = capacity_per_s(GPU, GPU_OPTIONS, CHAT)
    study.document |= {
        "device": GPU.to_dict(),
        "capacity_requests_per_s": round(capacity, 2),
        "tiers": [
            {"name": name, "priority": priority, "share": share, "ttft_slo_s": slo}
            for name, priority, share, slo in TIERS
        ],
    }
    rows: list[dict[str, Any]] = []
    for factor in LOADS:
        trace = load(factor * capacity, study.seed * 100)
        for policy, settings in POLICIES.items():
            seen = trace.replaced(priority=0) if policy == NO_TIERS else trace
            seen = seen.of_one_user() if policy == ONE_USER else seen
            options: SimEngineOptions = {**GPU_OPTIONS, "policy": settings}
            result = with_trace(simulate(seen, GPU, **options), trace)
            row: dict[str, Any] = {"load": factor, "policy": policy}
            for name, priority, _, slo_s in TIERS:
                mine = trace.priority == priority
                good = result.goodput(Slo(ttft_ms=1e3 * slo_s), mine)
                row[f"{name} p95 TTFT (s)"] = result.percentile(result.ttft_s, 95, mine)
                row[f"{name} good (%)"] = 100 * good * trace.duration_s / mine.sum()
            row["slot preemptions"] = result.stats.num_slot_preemptions
            row["output tokens/s"] = float(result.num_output_tokens.sum()) / result.total_s
            rows.append(row)
    study.table("Tiers under overload", "rows", rows)
    study.finish(lambda: draw(rows))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One column per tier: what it waits, and how much of it is good."""
    figure, axes = new_figure(5.4, 2, 3, sharex=True, sharey="row")
    for column, (name, _, share, slo_s) in enumerate(TIERS):
        top, bottom = axes[0][column], axes[1][column]
        plain(top, f"{name} ({share:.0%})")
        plain(bottom, f"TTFT within {slo_s:g} s")
        for policy, colour, line in zip(
            POLICIES,
            (PALETTE[4], *PALETTE[:4], PALETTE[0]),
            ("--", "-", "-.", ":", "-", ":"),
            strict=True,
        ):
            mine = [row for row in rows if row["policy"] == policy]
            loads = [row["load"] for row in mine]
            top.plot(
                loads,
                [row[f"{name} p95 TTFT (s)"] for row in mine],
                line,
                color=colour,
                label=policy,
            )
            bottom.plot(loads, [row[f"{name} good (%)"] for row in mine], line, color=colour)
        bottom.set_xlabel("load / capacity")
        bottom.set_xticks(np.arange(0.5, 3.1, 0.5))
        bottom.set_ylim(-3, 103)
        log_scale(top, "y")
    axes[0][0].set_ylabel("p95 TTFT (s)")
    axes[1][0].set_ylabel("good requests (%)")
    legend_below(figure, axes[0][0], 3)
    return figure


if __name__ == "__main__":
    main()
