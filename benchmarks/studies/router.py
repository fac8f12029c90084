"""Routing between replicas: in turn, to the least loaded, or to where the prompt's prefix is?

Simulated. Requests start with one of many shared prefixes of 1,000 tokens, twelve per replica, and
come at the same rate per replica from 1 to 64 of them. The routing policies are the package's own;
each replica is an engine with a clock of its own, brought to the time of every arrival.

    python benchmarks/studies/router.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore.lab.plot_style import plain
from batchcore.routing.policies import LeastOutstanding, PrefixAware, RoundRobin
from batchcore.simulation import SimRequest, SimulatedEngine, Trace, prompt_token_ids
from common import GPU, PALETTE, Study, legend_below, log_scale, new_figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchcore.routing.policies import RoutingPolicy
    from batchcore.simulation import SimEngineOptions
    from matplotlib.figure import Figure

REPLICAS = (1, 2, 4, 8, 16, 32, 64)
DURATION_S, WARM_UP_S = 40.0, 10.0
RATE_PER_REPLICA_S = 34.0
GROUPS_PER_REPLICA, SHARED_TOKENS, SKEW = 12, 1000, 0.8
LENGTHS: dict[str, Any] = {
    "prompt_tokens": "lognormal:60:0.5:5:300",
    "output_tokens": "lognormal:80:0.5:5:300",
}
OPTIONS: SimEngineOptions = {"max_num_seqs": 32, "n_ctx": 65_536}
POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "round robin": RoundRobin,
    "least outstanding tokens": LeastOutstanding,
    "prefix-aware": PrefixAware,
}


def requests_of(trace: Trace) -> list[SimRequest]:
    """Every request of a trace, with its tokens known by its group and key."""
    columns = trace.requests
    names = (
        "arrival_s",
        "num_prompt_tokens",
        "num_output_tokens",
        "prefix_group",
        "num_shared_tokens",
        "key",
    )
    values = zip(*(columns[name].tolist() for name in names), strict=True)
    return [SimRequest(**dict(zip(names, row, strict=True))) for row in values]


def route(trace: Trace, num_replicas: int, policy: RoutingPolicy) -> dict[str, float]:
    """Send every request to the replica that the policy chooses when it arrives."""
    engines = [SimulatedEngine(GPU, **OPTIONS) for _ in range(num_replicas)]
    waiting_shares = []
    for number, request in enumerate(requests_of(trace)):
        for engine in engines:
            engine.run_until(request.arrival_s)
        loads = [engine.load() for engine in engines]
        tokens = prompt_token_ids(request)
        chosen = policy.choose(tokens, loads)
        if engines[chosen].submit(request):
            policy.record(tokens, chosen)
        if number % 16 == 0 and request.arrival_s > WARM_UP_S:
            outstanding = [load.outstanding_tokens for load in loads]
            mean = sum(outstanding) / num_replicas
            if mean > 0:
                waiting_shares.append(max(outstanding) / mean)
    for engine in engines:
        engine.run_all()
    return figures([engine.result() for engine in engines], waiting_shares)


def figures(results: list[Any], waiting_shares: list[float]) -> dict[str, float]:
    """Of all replicas together, of the requests that came once caches were warm."""
    ttft, cached, prompts, work = [], 0, 0, []
    for result in results:
        warm = result.trace.arrival_s > WARM_UP_S
        ttft.append(result.ttft_s[warm])
        cached += int(result.num_cached_tokens[warm].sum())
        prompts += int(result.trace.num_prompt_tokens[warm].sum())
        computed = result.trace.num_prompt_tokens - result.num_cached_tokens
        work.append(int((computed + result.num_output_tokens)[warm].sum()))
    waits = np.concatenate(ttft)
    return {
        "hit rate (%)": 100 * cached / prompts,
        "p50 TTFT (ms)": 1e3 * float(np.percentile(waits, 50)),
        "p95 TTFT (ms)": 1e3 * float(np.percentile(waits, 95)),
        "work, busiest / mean": max(work) / (sum(work) / len(work)),
        "outstanding, most / mean": float(np.mean(waiting_shares)),
    }


def main() -> None:
    """Run every policy with every number of replicas."""
    study = Study("router", __doc__)
    study.document |= {
        "device": GPU.to_dict(),
        "rate_per_replica_s": RATE_PER_REPLICA_S,
        "groups_per_replica": GROUPS_PER_REPLICA,
        "shared_tokens": SHARED_TOKENS,
        "skew": SKEW,
    }
    rows: list[dict[str, Any]] = []
    for num_replicas in REPLICAS:
        trace = Trace.poisson(
            RATE_PER_REPLICA_S * num_replicas, DURATION_S, seed=study.seed, **LENGTHS
        ).with_prefix_groups(
            GROUPS_PER_REPLICA * num_replicas, SHARED_TOKENS, skew=SKEW, seed=study.seed
        )
        for name, make in POLICIES.items():
            found = route(trace, num_replicas, make())
            rows.append({"replicas": num_replicas, "policy": name, **found})
    study.table("Routing", "rows", rows)
    study.finish(lambda: draw(rows))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """By the number of replicas: hits, waiting, imbalance."""
    figure, (hits, waits, balance) = new_figure(3.4, 1, 3)
    for axes, title, key, unit in (
        (hits, "Prompt tokens cached", "hit rate (%)", "%"),
        (waits, "Time to first token", "p95 TTFT (ms)", "p95 (ms)"),
        (balance, "Work of the busiest", "work, busiest / mean", "times the mean"),
    ):
        plain(axes, title)
        for name, colour, line in zip(POLICIES, PALETTE[2::-1], ("--", "-.", "-"), strict=True):
            mine = [row for row in rows if row["policy"] == name]
            axes.plot(
                [row["replicas"] for row in mine],
                [row[key] for row in mine],
                line,
                color=colour,
                marker="o",
                markersize=3.5,
                label=name,
            )
        log_scale(axes, "x")
        axes.set_xticks(REPLICAS)
        axes.set_xlabel("replicas")
        axes.set_ylabel(unit)
    hits.set_ylim(0, 100)
    log_scale(waits, "y")
    balance.set_ylim(0.9, None)
    legend_below(figure, hits, 3)
    return figure


if __name__ == "__main__":
    main()
