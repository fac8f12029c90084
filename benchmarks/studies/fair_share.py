"""Fair share between users: weighted virtual token counters against first come, first served.

Simulated. First a user floods an engine that four others use a little: how long do the others wait?
Then two users who always have requests waiting, one with short and one with long ones: how far do
their shares of the service drift apart, and does that grow with time? First come, first served is
the same engine with everybody under one name.

    python benchmarks/studies/fair_share.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore import SchedulingPolicy
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
    from batchcore.simulation import SimEngineOptions, SimResult
    from matplotlib.figure import Figure

DURATION_S = 300.0
OPTIONS: SimEngineOptions = {
    **GPU_OPTIONS,
    "max_num_seqs": 32,
    "n_ctx": 32_768,
}
# Service is counted as the engine's defaults do.
PROMPT_COST, OUTPUT_COST = 1.0, 2.0


def run(trace: Trace, *, fair: bool, weights: dict[str, float] | None = None) -> SimResult:
    """One simulation; unfair is everybody under one name."""
    policy = SchedulingPolicy(aging_s=None, user_weights=weights or {})
    seen = trace if fair else trace.of_one_user()
    options: SimEngineOptions = {**OPTIONS, "policy": policy}
    return with_trace(simulate(seen, GPU, **options), trace)


def flood(study: Study) -> list[dict[str, Any]]:
    """One user sends twice what the engine can serve, four send a twentieth of it each."""
    capacity = capacity_per_s(GPU, OPTIONS, CHAT)
    study.document["capacity_requests_per_s"] = round(capacity, 2)
    trace = Trace.flooding(
        2 * capacity, capacity / 20, DURATION_S, num_others=4, seed=study.seed, **CHAT
    )
    quiet = ~(trace.user == trace.users.index("flood"))
    alone = trace.replaced()
    alone = Trace(alone.requests[quiet], alone.users)
    rows = []
    runs = {
        "the others alone": (simulate(alone, GPU, **OPTIONS), None),
        "first come, first served": (run(trace, fair=False), quiet),
        "fair share": (run(trace, fair=True), quiet),
        "fair share, flood has weight 4": (run(trace, fair=True, weights={"flood": 4.0}), quiet),
    }
    for name, (result, who) in runs.items():
        rows.append(
            {
                "policy": name,
                "p50 TTFT of the others (s)": result.percentile(result.ttft_s, 50, who),
                "p95 TTFT of the others (s)": result.percentile(result.ttft_s, 95, who),
                "p95 latency of the others (s)": result.percentile(result.latency_s, 95, who),
                "flood's requests served while it floods": int(
                    (result.finished_s[~quiet] <= DURATION_S).sum() if who is not None else 0
                ),
                "output tokens/s while it floods": _rate(result, DURATION_S),
            }
        )
    study.table("A flooding user", "flood", rows)
    return rows


def _rate(result: SimResult, end_s: float) -> float:
    done = result.finished_s <= end_s
    return float(result.num_output_tokens[done].sum()) / end_s


def backlogged(study: Study) -> dict[str, Any]:
    """Two users who always wait: the gap between what they were given, over time."""
    many = 2 * float(study.document["capacity_requests_per_s"])
    trace = Trace.merged(
        Trace.poisson(
            2.0 * many,
            DURATION_S,
            user="short",
            seed=study.seed,
            prompt_tokens="uniform:20:120",
            output_tokens="uniform:20:80",
        ),
        Trace.poisson(
            0.5 * many,
            DURATION_S,
            user="long",
            seed=study.seed + 1,
            prompt_tokens="uniform:400:1200",
            output_tokens="uniform:100:300",
        ),
    )
    longest = trace.num_prompt_tokens.max(), trace.num_output_tokens.max()
    slots = OPTIONS["max_num_seqs"]
    assert isinstance(slots, int)
    # Theorem 4.4 of Sheng et al.: a batch holds at most so many tokens.
    batch_tokens = min(OPTIONS["n_ctx"], slots * int(longest[0] + longest[1]))
    bound = 2 * max(PROMPT_COST * longest[0], OUTPUT_COST * batch_tokens)
    times = np.arange(5.0, DURATION_S, 1.0)
    curves, rows = {}, []
    for name, fair, weights in (
        ("first come, first served", False, {}),
        ("fair share", True, {}),
        ("fair share, 3 : 1", True, {"short": 3.0}),
    ):
        result = run(trace, fair=fair, weights=weights)
        weight = np.array([[weights.get(user, 1.0)] for user in trace.users])
        service = result.service(times) / weight
        gap = np.abs(service[0] - service[1])
        curves[name] = gap
        window = [
            result.jain_index(begin, begin + 10, weights=weights)
            for begin in np.arange(10.0, DURATION_S - 10, 10.0)
        ]
        shares = result.service([DURATION_S])[:, 0]
        rows.append(
            {
                "policy": name,
                "largest gap (cost units)": float(gap.max()),
                "gap at the end": float(gap[-1]),
                "bound": float(bound),
                "within the bound": "yes" if gap.max() <= bound else "no",
                "service short : long": float(shares[0] / shares[1]),
                "Jain index, all": result.jain_index(0.0, DURATION_S, weights=weights),
                "Jain index, worst 10 s": min(window),
            }
        )
    study.table("Two backlogged users", "backlogged", rows)
    return {"times": times, "curves": curves, "bound": bound}


def draw(rows: list[dict[str, Any]], gaps: dict[str, Any]) -> Figure:
    """Gap over time, and what the others wait."""
    figure, (left, right) = new_figure(3.7, 1, 2, width_ratios=(1, 1))
    plain(left, "Two users who always wait")
    for colour, (name, gap) in zip(PALETTE, gaps["curves"].items(), strict=False):
        left.plot(gaps["times"], np.maximum.accumulate(gap), color=colour, label=name)
    left.axhline(gaps["bound"], color=PALETTE[4], linestyle="--", label="bound of the theorem")
    log_scale(left, "y")
    left.set_ylim(100, None)
    left.set_xlabel("simulated time (s)")
    left.set_ylabel("largest gap in service so far (cost units)")
    legend_below(figure, left, 4)
    plain(right, "Four users beside one who floods", axis="x")
    names = [row["policy"].replace(", ", ",\n") for row in rows]
    values = [row["p95 TTFT of the others (s)"] for row in rows]
    places = np.arange(len(rows))[::-1]
    right.barh(places, values, height=0.6, color=(PALETTE[4], PALETTE[0], PALETTE[1], PALETTE[2]))
    for place, value in zip(places, values, strict=True):
        right.annotate(
            f"{value:.3g} s", (value, place), (4, 0), textcoords="offset points", va="center"
        )
    right.set_yticks(places, names)
    log_scale(right, "x")
    right.set_xlim(min(values) / 3, max(values) * 12)
    right.set_xlabel("p95 TTFT of the four (s)")
    return figure


def main() -> None:
    """Run both parts."""
    study = Study("fair_share", __doc__)
    study.document["device"] = GPU.to_dict()
    rows = flood(study)
    gaps = backlogged(study)
    every = slice(None, None, 10)
    study.document["gap_over_time"] = {
        "time_s": gaps["times"][every].tolist(),
        **{name: np.round(gap[every]).tolist() for name, gap in gaps["curves"].items()},
    }
    study.finish(lambda: draw(rows, gaps))


if __name__ == "__main__":
    main()
