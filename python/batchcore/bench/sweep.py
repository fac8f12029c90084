"""Throughput, latency and memory by batch size, and which size to take."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from batchcore.bench import memory
from batchcore.bench.runners import run_static, warm_up
from batchcore.bench.workload import Workload
from batchcore.engine import Engine
from batchcore.errors import ConfigError, EngineError
from batchcore.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.bench.model_cost import ModelCost
    from batchcore.model import Model

    Row = dict[str, Any]

__all__ = ["recommend", "sweep_batch_sizes"]

_KNEE = 0.95
_RULE = f"the smallest batch size with at least {100 * _KNEE:.0f}% of the best throughput"
# llama.cpp rounds the cells of a sequence up to a multiple of this.
_CELL_QUANTUM = 256


def sweep_batch_sizes(
    model: Model,
    sizes: Sequence[int],
    *,
    input_len: int,
    output_len: int,
    n_threads: int | None = None,
    cost: ModelCost | None = None,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run one batch of each size, in an engine of its own.

    A size that does not fit becomes a row that says so, and the sweep goes on: either the memory
    that it would take is not free (checked before, lest the system swaps), or the engine had none.

    Args:
        model: What to run.
        sizes: Requests at a time.
        input_len: Prompt tokens of each.
        output_len: Output tokens of each.
        n_threads: As for `Engine`.
        cost: The model's shapes, for an exact estimate of its KV cells.
        seed: Of the prompts.
        on_row: Called after each size.

    Raises:
        ConfigError: There is no size, or one is below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"batch sizes must be at least 1, not {list(sizes)}")
    rows = []
    for size in sizes:
        gc.collect()  # the engine of the size before
        cells = -(-(input_len + output_len) // _CELL_QUANTUM) * _CELL_QUANTUM
        kv_bytes = memory.kv_bytes(model, cost, size, cells)
        needed = memory.needed_bytes(model, kv_bytes, size)
        problem = memory.why_not(needed, memory.free_bytes())
        row: Row = {
            "batch_size": size,
            "fits": problem is None,
            **dict.fromkeys(
                ("total_s", "output_tokens_per_s", "total_tokens_per_s", "mean_latency_s")
            ),
            "p95_latency_s": None,
            "memory_bytes": None,
            "kv_bytes": kv_bytes,
            "note": problem or "",
        }
        if problem is None:
            try:
                row.update(_run(model, size, size * cells, input_len, output_len, n_threads, seed))
            except EngineError as error:
                row.update(fits=False, note=str(error).rstrip("."))
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _run(
    model: Model,
    size: int,
    n_ctx: int,
    input_len: int,
    output_len: int,
    n_threads: int | None,
    seed: int,
) -> Row:
    workload = Workload.generate(
        model, num_prompts=size, prompt_tokens=input_len, output_tokens=output_len, seed=seed
    )
    prompts = [request.prompt for request in workload]
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    with Engine(
        model, max_num_seqs=size, n_ctx=n_ctx, n_threads=n_threads, prefix_caching=False
    ) as engine:
        warm_up(engine, prompts)
        result = run_static(engine, prompts, params, batch_size=size)
        used = memory.used_bytes()
    return {
        "total_s": result.total_s,
        "output_tokens_per_s": result.output_tokens_per_s,
        "total_tokens_per_s": (result.num_output_tokens + size * input_len) / result.total_s,
        "mean_latency_s": result.mean_latency_s,
        "p95_latency_s": result.latency_percentile_s(95),
        "memory_bytes": used,
    }


def recommend(rows: Sequence[Row], latency_target_s: float | None = None) -> dict[str, Any]:
    """The knee of the throughput, and why it is that.

    Args:
        rows: Of a sweep.
        latency_target_s: Sizes whose p95 latency is above it are out of question.
    """
    fitting = [row for row in rows if row["fits"]]
    rule = _RULE
    if latency_target_s is not None:
        rule += f", of those with a p95 latency of at most {latency_target_s:g} s"
        fitting = [row for row in fitting if row["p95_latency_s"] <= latency_target_s]
    rates = {row["batch_size"]: row["output_tokens_per_s"] for row in fitting}
    if not rates:
        missed = latency_target_s is not None and any(row["fits"] for row in rows)
        reason = "no batch size meets the latency target" if missed else "no batch size fits"
        return {"batch_size": None, "reason": reason, "rule": rule}
    best = max(rates, key=lambda size: rates[size])
    size = min(size for size in rates if rates[size] >= _KNEE * rates[best])
    reason = f"{size} reach {rates[size]:.1f} output tokens/s"
    if size == best:
        reason += ", and no other size comes near it with fewer"
    else:
        share = 100 * rates[size] / rates[best]
        reason += f", {share:.0f}% of the best, {rates[best]:.1f} with {best}"
    p95 = {row["batch_size"]: row["p95_latency_s"] for row in rows}
    largest = max(rates)
    if largest > size and p95[size]:
        reason += (
            f"; with {largest} a request takes {p95[largest] / p95[size]:.1f} times as long (p95)"
        )
    return {"batch_size": size, "reason": reason, "rule": rule}
