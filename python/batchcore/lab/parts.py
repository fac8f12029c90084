"""Parts 1, 2, 3 and 5: one at a time, static batches, batch sizes, and dynamic batching."""

from __future__ import annotations

import gc
import statistics
from typing import TYPE_CHECKING, Any

from batchcore import padding
from batchcore.bench import memory
from batchcore.bench.runners import run_continuous, run_sequential, run_static, spread_max_tokens
from batchcore.bench.sweep import recommend
from batchcore.errors import EngineError
from batchcore.lab.runs import complete, median_run, median_watched, paired, run_figures
from batchcore.lab.setup import cells_per_seq, greedy, warm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from batchcore.lab.runs import Run
    from batchcore.lab.setup import Lab

    Sections = dict[str, Any]

__all__ = ["measure_baseline", "measure_batch_sizes", "measure_dynamic"]


def measure_baseline(lab: Lab, _done: Mapping[str, Any]) -> Sections:
    """Parts 1 and 2: one request, all one by one, and all in one static batch.

    They take turns, so that each speed-up is of two runs that met the same machine.
    """
    c = lab.config
    size = min(c.num_prompts, c.max_num_seqs)
    prompts, params = lab.prompts(c.num_prompts, c.prompt_tokens), greedy(c.max_tokens)
    with lab.engine(c.max_num_seqs, c.prompt_tokens + c.max_tokens) as engine:
        warm(engine, prompts)
        single, sequential, static = lab.in_turns(
            c.repeats,
            {
                "one request": lambda: lab.watch(
                    engine, lambda: run_sequential(engine, prompts[:1], params)
                ),
                "one by one": lambda: lab.watch(
                    engine, lambda: run_sequential(engine, prompts, params)
                ),
                "static batch": lambda: lab.watch(
                    engine, lambda: run_static(engine, prompts, params, batch_size=size)
                ),
            },
        )
    sequential_runs, static_runs = ([one.run for one in runs] for runs in (sequential, static))
    return {
        "sequential": {
            "runs": sequential_runs,
            "single_s": statistics.median(one.run["total_s"] for one in single),
            "median": median_run(sequential_runs),
            "utilisation": median_watched(sequential).utilisation(1),
        },
        "static": {
            "runs": static_runs,
            "batch_size": size,
            "median": median_run(static_runs),
            "speedup": paired(sequential_runs, static_runs, "output_tokens_per_s"),
            "parallel_ideal": size,
            "utilisation": median_watched(static).utilisation(size),
        },
    }


def measure_batch_sizes(lab: Lab, _done: Mapping[str, Any]) -> Sections:
    """Part 3: as many requests as the batch size, in one batch, each size in its own engine."""
    c = lab.config
    rows: dict[int, Run] = {}
    runs: dict[int, list[Run]] = {size: [] for size in c.batch_sizes}

    def measure(size: int) -> Callable[[], None]:
        def run_once() -> None:
            if size not in rows:
                rows[size] = _empty_row(lab, size)
            row = rows[size]
            if row["fits"]:
                run = _run_size(lab, size, row)
                if run is not None:
                    runs[size].append(run)

        return run_once

    lab.in_turns(c.sweep_repeats, {f"batch size {size}": measure(size) for size in c.batch_sizes})
    for size, row in rows.items():
        if row["fits"]:
            middle = median_run(runs[size])
            row.update({name: middle[name] for name in _ROW_FIGURES})
            row["mean_latency_s"] = middle["latency_s"]["mean"]
            row["p95_latency_s"] = middle["latency_s"]["p95"]
            row["runs"] = runs[size]
    ordered = [rows[size] for size in c.batch_sizes]
    return {"batch_sizes": {"rows": ordered, "recommended": recommend(ordered)}}


_ROW_FIGURES = ("total_s", "output_tokens_per_s", "total_tokens_per_s")


def _empty_row(lab: Lab, size: int) -> Run:
    """A row of the table, with the verdict of the memory on it."""
    c = lab.config
    cells = cells_per_seq(c.prompt_tokens + c.short_max_tokens)
    kv = memory.kv_bytes(lab.model, lab.cost, size, cells)
    gc.collect()  # engines of sizes before
    problem = memory.why_not(memory.needed_bytes(lab.model, kv, size), memory.free_bytes())
    return {
        "batch_size": size,
        "fits": problem is None,
        **dict.fromkeys((*_ROW_FIGURES, "mean_latency_s", "p95_latency_s", "memory_bytes")),
        "kv_bytes": kv,
        "note": problem or "",
    }


def _run_size(lab: Lab, size: int, row: Run) -> Run | None:
    """One run; None, and a note in the row, where the engine has no memory for it."""
    c = lab.config
    prompts = lab.prompts(size, c.prompt_tokens)
    try:
        with lab.engine(size, c.prompt_tokens + c.short_max_tokens) as engine:
            warm(engine, prompts)
            result = run_static(engine, prompts, greedy(c.short_max_tokens), batch_size=size)
            used = memory.used_bytes()
    except EngineError as error:
        row.update(fits=False, note=str(error).rstrip("."))
        return None
    if used is not None:
        row["memory_bytes"] = max(used, row["memory_bytes"] or 0)
    return run_figures(complete(result))


def measure_dynamic(lab: Lab, _done: Mapping[str, Any]) -> Sections:
    """Part 5: the same requests in static batches, and continuously batched."""
    c = lab.config
    prompts = lab.varied_prompts(c.dynamic_prompts, seed_offset=2)
    outputs = spread_max_tokens(c.max_tokens, len(prompts))
    params = [greedy(tokens) for tokens in outputs]
    slots = c.max_num_seqs
    with lab.engine(slots, max(map(len, prompts)) + max(outputs)) as engine:
        warm(engine, prompts)
        found = lab.in_turns(
            c.repeats,
            {
                "static batches": lambda: lab.watch(
                    engine, lambda: run_static(engine, prompts, params, batch_size=slots)
                ),
                "continuous": lambda: lab.watch(
                    engine, lambda: run_continuous(engine, prompts, params)
                ),
            },
        )
    watched = dict(zip(("static", "continuous"), found, strict=True))
    runs = {mode: [one.run for one in each] for mode, each in watched.items()}
    middle = {mode: median_watched(each) for mode, each in watched.items()}
    use = {mode: one.utilisation(slots) for mode, one in middle.items()}
    figures = {
        "throughput": ("output_tokens_per_s",),
        "mean_latency": ("latency_s", "mean"),
        "p95_latency": ("latency_s", "p95"),
    }
    report = padding.static_batches([*map(len, prompts)], outputs, slots)
    return {
        "dynamic": {
            **{mode: one.run for mode, one in middle.items()},
            "runs": runs,
            "improvement": {
                name: paired(runs["static"], runs["continuous"], *path)
                for name, path in figures.items()
            },
            "improvement_rule": "continuous / static of each round; latency: less is better",
            "utilisation": use,
            "slot_waste": {mode: 1 - one["slot_use"] for mode, one in use.items()},
            "slot_waste_rule": "share of slots x total time in which a slot held no request",
            "static_formula_slot_waste": report.slot_waste,
            "batch_size": slots,
        },
        "monitor": {mode: one.thinned_monitor() for mode, one in middle.items()},
    }
