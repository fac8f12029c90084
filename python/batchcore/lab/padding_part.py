"""Part 4: what requests of different lengths cost, by formula and as counted by the engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from batchcore import padding
from batchcore.bench.runners import spread_max_tokens
from batchcore.bucketing import equal_count, optimal
from batchcore.lab.runs import median_run
from batchcore.lab.setup import greedy, warm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchcore.engine import Engine
    from batchcore.lab.runs import Run
    from batchcore.lab.setup import Lab, Prompts
    from batchcore.params import SamplingParams

__all__ = ["measure_padding"]

_NUM_BUCKETS = 3


def measure_padding(lab: Lab, _done: Mapping[str, Any]) -> dict[str, Any]:
    """Part 4: what prompts of different lengths pad, and which slots stand idle, and for how long.

    Idle slots are predicted by the formula and counted by the engine, over the same batches.
    """
    c = lab.config
    size, count = c.padding_batch_size, c.padding_prompts
    prompts = lab.varied_prompts(count, seed_offset=1)
    lengths = [len(prompt) for prompt in prompts]
    outputs = spread_max_tokens(c.short_max_tokens, count)
    params = [greedy(tokens) for tokens in outputs]
    # The last knows what no server does, how long outputs will be: the best that sorting can do.
    plans = {
        "none": ("order of arrival", None),
        "sorted": ("prompt length", equal_count(lengths, 1)),
        "optimal": ("prompt length", optimal(lengths, _NUM_BUCKETS)),
        "sorted by output": ("output length", equal_count(outputs, 1)),
    }
    reports = {
        name: padding.static_batches(lengths, outputs, size, buckets)
        for name, (_, buckets) in plans.items()
    }
    with lab.engine(size, max(lengths) + max(outputs)) as engine:
        warm(engine, prompts)
        variants = {
            name: _static_counter(engine, prompts, params, report)
            for name, report in reports.items()
        }
        variants["continuous"] = _continuous_counter(engine, prompts, params)
        *static, continuous = lab.in_turns(c.padding_repeats, variants)
    slot = [
        {"strategy": name, "grouped_by": plans[name][0], **_slot_row(report, counted)}
        for (name, report), counted in zip(reports.items(), static, strict=True)
    ]
    strategies = padding.compare_strategies(
        lengths, num_buckets=_NUM_BUCKETS, max_tokens=c.short_max_tokens, batch_size=size
    )
    return {
        "padding": {
            "lengths": lengths,
            "output_lengths": outputs,
            "max_tokens": c.short_max_tokens,
            "batch_size": size,
            "lab_formula_waste_pct": padding.calculate_padding_waste(lengths, c.short_max_tokens),
            "prompt_strategies": [strategy.to_dict() for strategy in strategies],
            "slot": slot,
            "continuous": median_run(continuous),
        }
    }


def _static_counter(
    engine: Engine,
    prompts: Prompts,
    params: Sequence[SamplingParams],
    report: padding.StaticReport,
) -> Callable[[], Run]:
    batches = [batch.indices for batch in report.batches]

    def run_once() -> Run:
        before = engine.stats().padding
        start = time.perf_counter()
        # In the batches of the formula as they are; a bucket by name might be cut otherwise.
        engine.generate(
            prompts,
            params,
            batching="static",
            batch_size=max(map(len, batches)),
            bucketing=lambda _lengths: batches,
        )
        total_s = time.perf_counter() - start
        after = engine.stats().padding
        busy = after.busy_slot_steps - before.busy_slot_steps
        idle = after.idle_slot_steps - before.idle_slot_steps
        return {
            "total_s": total_s,
            "busy_slot_steps": busy,
            "idle_slot_steps": idle,
            "waste": idle / (busy + idle),
        }

    return run_once


def _continuous_counter(
    engine: Engine, prompts: Prompts, params: Sequence[SamplingParams]
) -> Callable[[], Run]:
    def run_once() -> Run:
        before = engine.stats().padding
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        total_s = time.perf_counter() - start
        after = engine.stats().padding
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        computed = after.attention_computed - before.attention_computed
        needed = after.attention_needed - before.attention_needed
        rows = after.num_rows - before.num_rows
        fillers = after.num_filler_rows - before.num_filler_rows
        return {
            "attention_waste": (computed - needed) / computed if computed else 0.0,
            "shape_waste": fillers / rows if rows else 0.0,
            "num_rows": rows,
            "num_filler_rows": fillers,
            "total_s": total_s,
            "output_tokens_per_s": tokens / total_s,
        }

    return run_once


def _slot_row(report: padding.StaticReport, runs: Sequence[Run]) -> Run:
    counts = ("busy_slot_steps", "idle_slot_steps")
    formula = {name: getattr(report, name) for name in counts}
    total_s = median_run(runs)["total_s"]
    return {
        "formula": {"slot_steps": report.slot_steps, **formula, "waste": report.slot_waste},
        "counted": {name: runs[0][name] for name in (*counts, "waste")},
        "agree": all(run[name] == formula[name] for run in runs for name in counts),
        "num_batches": len(report.batches),
        "total_s": total_s,
        "output_tokens_per_s": report.busy_slot_steps / total_s,
    }
