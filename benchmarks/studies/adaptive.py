"""How many sequences at a time? The engine's own choice against fixed numbers, over a day.

Simulated, on a device where each sequence adds to what a step takes, over a day whose load is low
at night and high at noon. Fixed sizes of 4, 16 and 64 against `max_num_seqs="auto"`, with a target
of 80 ms between tokens; all of them are told the target, which sizes prompt chunks too. Then the
same with a target of 50 ms, which is hard to keep: the smallest chunk of a prompt takes 19 ms here.

    python benchmarks/studies/adaptive.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore.bench.metrics import Slo
from batchcore.lab.plot_style import plain
from batchcore.simulation import Trace, simulate
from common import PALETTE, SMALL, Study, between, legend_below, log_scale, new_figure

if TYPE_CHECKING:
    from typing import Literal

    from batchcore.simulation import SimResult
    from matplotlib.figure import Figure

DAY_S = 1800.0
MEAN_RATE_PER_S = 2.3
SWING = 0.8
TARGET_ITL_MS = 80.0
TIGHT_ITL_MS = 50.0
INTERVAL_S = 15.0
LENGTHS: dict[str, Any] = {
    "prompt_tokens": "lognormal:150:0.6:10:800",
    "output_tokens": "lognormal:100:0.6:5:400",
}
SIZES: tuple[int | Literal["auto"], ...] = (4, 16, 64, "auto")


def over_time(result: SimResult) -> dict[str, list[float]]:
    """Per interval: gaps between tokens, tokens per second, sequences that may run and that do."""
    series: dict[str, list[float]] = {
        "time_s": [],
        "p95_itl_s": [],
        "tokens_per_s": [],
        "limit": [],
        "running": [],
    }
    pairs = zip(result.samples, result.samples[1:], strict=False)
    for before, after in pairs:
        if after.time_s > DAY_S:
            break
        gaps = between(before.stats.latencies.itl, after.stats.latencies.itl)
        tokens = after.stats.num_generated_tokens - before.stats.num_generated_tokens
        series["time_s"].append(after.time_s)
        series["p95_itl_s"].append(gaps.quantile(0.95) if gaps.count else 0.0)
        series["tokens_per_s"].append(tokens / (after.time_s - before.time_s))
        series["limit"].append(after.stats.batch_size_limit)
        series["running"].append(after.stats.num_running)
    return series


def run(
    trace: Trace, size: int | Literal["auto"], target_itl_ms: float, **options: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """One day: its figures, and how it went."""
    result = simulate(
        trace,
        SMALL,
        max_num_seqs=size,
        n_ctx=65_536,
        target_itl_ms=target_itl_ms,
        max_queued_requests=1_000_000,
        sample_interval_s=INTERVAL_S,
        **options,
    )
    noon = (trace.arrival_s > DAY_S / 3) & (trace.arrival_s < 2 * DAY_S / 3)
    slo = Slo(ttft_ms=5000.0, tpot_ms=target_itl_ms)
    series = over_time(result)
    itl = result.stats.latencies.itl
    row = {
        "target (ms)": target_itl_ms,
        "max_num_seqs": str(size),
        "prefill_policy": options.get("prefill_policy", "balanced"),
        "p50 ITL (ms)": 1e3 * itl.quantile(0.5),
        "p95 ITL (ms)": 1e3 * itl.quantile(0.95),
        "p95 TTFT (s)": result.percentile(result.ttft_s, 95),
        "p95 TTFT at noon (s)": result.percentile(result.ttft_s, 95, noon),
        "most tokens/s": max(series["tokens_per_s"]),
        "good requests (%)": 100 * float(result.is_good(slo).mean()),
        "decisions up": result.stats.num_batch_size_increases,
        "down": result.stats.num_batch_size_decreases,
    }
    return row, series


def main() -> None:
    """Run the day with each size, for both targets."""
    study = Study("adaptive", __doc__)
    trace = Trace.day(MEAN_RATE_PER_S, DAY_S, swing=SWING, seed=study.seed, **LENGTHS)
    study.document |= {
        "device": SMALL.to_dict(),
        "mean_rate_per_s": MEAN_RATE_PER_S,
        "num_requests": len(trace),
    }
    rows: list[dict[str, Any]] = []
    days: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        row, days[str(size)] = run(trace, size, TARGET_ITL_MS)
        rows.append(row)
    rows += [run(trace, size, TIGHT_ITL_MS)[0] for size in SIZES]
    rows.append(run(trace, "auto", TIGHT_ITL_MS, prefill_policy="latency")[0])
    study.table("A day", "rows", rows)
    study.document["over_time"] = {
        size: {name: [float(f"{value:.4g}") for value in values] for name, values in day.items()}
        for size, day in days.items()
    }
    study.finish(lambda: draw(trace, days))


def draw(trace: Trace, days: dict[str, dict[str, list[float]]]) -> Figure:
    """The load, what was decided, and what came of it, over the day."""
    figure, axes = new_figure(5.6, 2, 2, sharex=True)
    (load, limit), (gaps, tokens) = axes
    edges = np.arange(0.0, DAY_S + 1, 60.0)
    counts, _ = np.histogram(trace.arrival_s, edges)
    plain(load, "Load")
    load.stairs(counts / 60.0, edges / 60, color=PALETTE[5])
    load.set_ylabel("requests/s")
    load.set_ylim(0, None)
    plain(limit, "Sequences that run")
    plain(gaps, "Between tokens, p95 per 15 s")
    plain(tokens, "Output")
    for (size, day), colour in zip(days.items(), (*PALETTE[1:4], PALETTE[0]), strict=True):
        minutes = np.array(day["time_s"]) / 60
        width = 2.2 if size == "auto" else 1.2
        limit.plot(
            minutes, day["running"], color=colour, linewidth=width, label=f"max_num_seqs={size}"
        )
        shown = np.array(day["p95_itl_s"]) * 1e3
        gaps.plot(minutes, np.where(shown > 0, shown, np.nan), color=colour, linewidth=width)
        tokens.plot(minutes, day["tokens_per_s"], color=colour, linewidth=width)
    auto = days["auto"]
    limit.step(
        np.array(auto["time_s"]) / 60,
        auto["limit"],
        color=PALETTE[5],
        linewidth=1,
        linestyle="--",
        label="what auto allowed",
    )
    gaps.axhline(TARGET_ITL_MS, color=PALETTE[5], linewidth=1, linestyle=":", label="target")
    gaps.legend(loc="lower right")
    log_scale(limit, "y")
    gaps.set_ylabel("ms")
    gaps.set_ylim(0, None)
    tokens.set_ylabel("tokens/s")
    for bottom in (gaps, tokens):
        bottom.set_xlabel("simulated time (min)")
    legend_below(figure, limit, 3)
    return figure


if __name__ == "__main__":
    main()
