"""A SAMPLE of the lab's document: made up, of a machine and a model that don't exist.

The times come from a toy of an engine whose step costs a fixed time and one per row, so that all
figures fit together as those of a real run do; counts, ratios and summaries are made by the same
code as real ones.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore import padding
from batchcore.bench.compare import compare_pairs
from batchcore.bench.metrics import RequestRecord, summarize
from batchcore.bench.model_cost import AttentionLayer, ModelCost
from batchcore.bench.monitor import MonitorResult
from batchcore.bench.peaks import Peaks
from batchcore.bench.roofline import Roofline
from batchcore.bench.runners import percentile, spread_max_tokens
from batchcore.bucketing import equal_count, optimal

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_S, ROW_S, PROMPT_TOKEN_S = 0.012, 0.0035, 0.0011
SLOTS, REPEATS, SEED = 8, 3, 7
PROMPTS = [12, 40, 7, 100, 55, 31, 18, 64]
PROMPTS += [9, 22, 71, 15, 33, 48, 90, 11, 26, 60, 8, 37, 19, 83, 14, 45]
OUTPUTS = spread_max_tokens(64, len(PROMPTS))
KV_BYTES_PER_SEQUENCE = 9_437_184
MODEL_BYTES = 291_545_600


def step_s(rows: int) -> float:
    return STEP_S + ROW_S * rows


def simulate(
    prompts: Sequence[int],
    outputs: Sequence[int],
    slots: int,
    *,
    refill: bool = False,
    arrivals: Sequence[float] | None = None,
    slowness: float = 1.0,
) -> dict[str, Any]:
    """Run the toy: first token and end of each request, and how many ran at which time."""
    arrivals = arrivals or [0.0] * len(prompts)
    waiting, running, now = list(range(len(prompts))), {}, 0.0
    first, end, samples = {}, {}, []
    while waiting or running:
        prefill = 0
        if refill or not running:
            while waiting and len(running) < slots and arrivals[waiting[0]] <= now:
                index = waiting.pop(0)
                running[index] = outputs[index]
                prefill += prompts[index]
        if not running:
            now = arrivals[waiting[0]]
            continue
        now += slowness * (step_s(len(running)) + PROMPT_TOKEN_S * prefill)
        samples.append((now, len(running), prefill))
        for index in list(running):
            first.setdefault(index, now)
            running[index] -= 1
            if not running[index]:
                del running[index]
                end[index] = now
    return {
        "total_s": now,
        "ttft_s": [first[i] - arrivals[i] for i in range(len(prompts))],
        "latency_s": [end[i] - arrivals[i] for i in range(len(prompts))],
        "samples": samples,
    }


def times(values: Sequence[float], *percents: int) -> dict[str, float]:
    named = {f"p{percent}": percentile(values, percent) for percent in percents}
    return {"mean": statistics.fmean(values), **named}


def run(mode: str, prompts: Sequence[int], outputs: Sequence[int], slots: int, slowness: float):
    toy = simulate(prompts, outputs, slots, refill=mode == "continuous", slowness=slowness)
    total_s = toy["total_s"]
    return {
        "mode": mode,
        "interrupted": False,
        "num_requests": len(prompts),
        "num_finished": len(prompts),
        "total_s": total_s,
        "num_prompt_tokens": sum(prompts),
        "num_output_tokens": sum(outputs),
        "output_tokens_per_s": sum(outputs) / total_s,
        "total_tokens_per_s": (sum(prompts) + sum(outputs)) / total_s,
        "latency_s": times(toy["latency_s"], 50, 95, 99),
        "ttft_s": times(toy["ttft_s"], 50, 95),
        "latencies_s": toy["latency_s"],
        "ttfts_s": toy["ttft_s"],
    }


def runs(mode: str, prompts: Sequence[int], outputs: Sequence[int], slots: int, seed: int):
    rng = random.Random(seed)
    return [run(mode, prompts, outputs, slots, rng.uniform(0.98, 1.02)) for _ in range(REPEATS)]


def median(all_runs: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(all_runs, key=lambda one: one["total_s"])[len(all_runs) // 2]


def ratio(baseline: list[dict[str, Any]], candidate: list[dict[str, Any]], *path: str):
    def value(one: Any) -> float:
        for name in path:
            one = one[name]
        return one

    pairs = compare_pairs(list(map(value, baseline)), list(map(value, candidate)))
    return {
        "median": pairs.median,
        "low": pairs.low,
        "high": pairs.high,
        "values": list(pairs.ratios),
    }


def batch_size_rows() -> list[dict[str, Any]]:
    rows = []
    for size in (1, 2, 4, 8, 16, 32):
        one = run("static", PROMPTS[:1] * size, [50] * size, size, 1.0)
        slower = run("static", PROMPTS[:1] * size, [50] * size, size, 1.04)
        kv_bytes = size * KV_BYTES_PER_SEQUENCE
        rows.append(
            {
                "batch_size": size,
                "fits": True,
                "total_s": one["total_s"],
                "output_tokens_per_s": one["output_tokens_per_s"],
                "total_tokens_per_s": one["total_tokens_per_s"],
                "mean_latency_s": one["latency_s"]["mean"],
                "p95_latency_s": one["latency_s"]["p95"],
                "memory_bytes": MODEL_BYTES + 52_428_800 + kv_bytes,
                "kv_bytes": kv_bytes,
                "note": "",
                "runs": [one, slower],
            }
        )
    return rows


def slot_rows() -> list[dict[str, Any]]:
    plans = {
        "none": ("order of arrival", None),
        "sorted": ("prompt length", equal_count(PROMPTS, 1)),
        "optimal": ("prompt length", optimal(PROMPTS, 3)),
        "sorted by output": (
            "output length, which is known beforehand here",
            equal_count(OUTPUTS, 1),
        ),
    }
    rows = []
    for strategy, (grouped_by, buckets) in plans.items():
        report = padding.static_batches(PROMPTS, OUTPUTS, SLOTS, buckets)
        total_s = sum(
            simulate(batch.prompt_lengths, batch.output_lengths, SLOTS)["total_s"]
            for batch in report.batches
        )
        counted = {
            "busy_slot_steps": report.busy_slot_steps,
            "idle_slot_steps": report.idle_slot_steps,
            "waste": report.slot_waste,
        }
        rows.append(
            {
                "strategy": strategy,
                "grouped_by": grouped_by,
                "formula": {"slot_steps": report.slot_steps, **counted},
                "counted": counted,
                "agree": True,
                "num_batches": len(report.batches),
                "total_s": total_s,
                "output_tokens_per_s": sum(OUTPUTS) / total_s,
            }
        )
    return rows


def padding_part() -> dict[str, Any]:
    continuous = run("continuous", PROMPTS, OUTPUTS, SLOTS, 1.0)
    strategies = padding.compare_strategies(PROMPTS, num_buckets=3, max_tokens=64)
    return {
        "lengths": PROMPTS,
        "output_lengths": OUTPUTS,
        "max_tokens": 64,
        "batch_size": SLOTS,
        "lab_formula_waste_pct": padding.calculate_padding_waste(PROMPTS, 64),
        "prompt_strategies": [strategy.to_dict() for strategy in strategies],
        "slot": slot_rows(),
        "continuous": {
            "attention_waste": 0.41,
            "shape_waste": 0.02,
            "num_rows": 1790,
            "num_filler_rows": 36,
            "total_s": continuous["total_s"],
            "output_tokens_per_s": continuous["output_tokens_per_s"],
        },
    }


def utilisation(mode: str, prompts: Sequence[int], outputs: Sequence[int], slots: int):
    toy = simulate(prompts, outputs, slots, refill=mode == "continuous")
    steps = len(toy["samples"])
    rows = sum(rows for _, rows, _ in toy["samples"]) / steps
    return {
        "num_steps": steps,
        "rows_per_call": rows,
        "slot_use": sum(outputs) / (steps * slots),
        "decode_share": 0.95,
        "mean_running": rows,
        "process_cpu_percent": 192.5,
        "system_cpu_percent": 96.5,
        "max_memory_bytes": 4.2e8,
        "gpu_utilisation_percent": None,
        "gpu_memory_busy_percent": None,
    }


def dynamic_part() -> dict[str, Any]:
    static = runs("static", PROMPTS, OUTPUTS, SLOTS, 1)
    continuous = runs("continuous", PROMPTS, OUTPUTS, SLOTS, 2)
    use = {mode: utilisation(mode, PROMPTS, OUTPUTS, SLOTS) for mode in ("static", "continuous")}
    return {
        "static": median(static),
        "continuous": median(continuous),
        "runs": {"static": static, "continuous": continuous},
        "improvement": {
            "throughput": ratio(static, continuous, "output_tokens_per_s"),
            "mean_latency": ratio(static, continuous, "latency_s", "mean"),
            "p95_latency": ratio(static, continuous, "latency_s", "p95"),
        },
        "improvement_rule": "continuous / static of each round; latency: less is better",
        "utilisation": use,
        "slot_waste": {mode: 1 - one["slot_use"] for mode, one in use.items()},
        "batch_size": SLOTS,
    }


def load_row(fraction: float, capacity: float) -> dict[str, Any]:
    rate = fraction * capacity
    rng = random.Random(SEED)
    arrivals = np.cumsum([rng.expovariate(rate) for _ in range(60)]).tolist()
    lengths, outputs = (PROMPTS * 3)[:60], (OUTPUTS * 3)[:60]
    toy = simulate(lengths, outputs, SLOTS, refill=True, arrivals=arrivals)
    records = [
        RequestRecord(
            index=i,
            arrival_s=arrivals[i],
            due_s=arrivals[i],
            submitted_s=arrivals[i] + 0.0004,
            num_prompt_tokens=lengths[i],
            completion_tokens=(outputs[i],),
            ttft_s=toy["ttft_s"][i],
            itl_s=(step_s(4),) * (outputs[i] - 1),
            latency_s=toy["latency_s"][i],
            finish_reason="length",
        )
        for i in range(60)
    ]
    summary = summarize(records, toy["total_s"]).to_metrics()
    return {
        "request_rate": rate,
        "capacity_fraction": fraction,
        "summary": summary,
        "num_refused": 0,
    }


def scheduler_part() -> dict[str, Any]:
    total_s = simulate(PROMPTS, OUTPUTS, SLOTS, refill=True)["total_s"]
    capacity = len(PROMPTS) / total_s
    return {
        "loads": [load_row(fraction, capacity) for fraction in (0.5, 0.8, 1.1)],
        "capacity_requests_per_s": capacity,
        "note": "Capacity: requests per second of the continuous run of part 5.",
    }


def monitor(mode: str) -> dict[str, Any]:
    samples = simulate(PROMPTS, OUTPUTS, SLOTS, refill=mode == "continuous")["samples"]
    count = len(samples)
    time_s = np.array([0.0] + [at_s for at_s, _, _ in samples])
    rows = np.array([0.0] + [float(rows) for _, rows, _ in samples])
    rng = np.random.default_rng(SEED)
    cpu = np.concatenate(([math.nan], 188 + 8 * rng.random(count)))
    tokens_per_s = np.divide(rows[1:], np.diff(time_s))
    return MonitorResult(
        columns={
            "time_s": time_s,
            "num_running": rows,
            "step_decode_rows": rows,
            "process_cpu_percent": cpu,
            "process_rss_bytes": np.full(count + 1, 4.2e8),
            "generated_tokens_per_s": np.concatenate(([math.nan], tokens_per_s)),
            "read_bytes_per_s": np.concatenate(([math.nan], 2.6e8 / np.diff(time_s))),
        },
        start_s=100.0,
        interval_s=0.02,
        gpus=[],
        missing={"gpu": "nvidia-ml-py is not installed: pip install 'batchcore[nvml]'"},
        errors={},
        first_errors={},
    ).to_dict()


def roofline_part() -> dict[str, Any]:
    cost = ModelCost(
        name="sample-270m.Q8_0.gguf",
        architecture="sample",
        tensor_bytes=MODEL_BYTES,
        layer_bytes=106_000_000,
        layer_flops_per_row=200_000_000,
        head_bytes=178_000_000,
        head_flops_per_output=335_000_000,
        has_tied_head=True,
        embedding_bytes_per_row=680,
        lookup_bytes_per_row=0,
        expert_bytes=0,
        expert_flops_per_row=0,
        expert_count=0,
        expert_used_count=0,
        state_bytes_per_sequence=0,
        attention=tuple(AttentionLayer(1024, 4096, 512) for _ in range(18)),
    )
    peaks = Peaks(bytes_per_s=24e9, flops_per_s=190e9, num_threads=2)
    line = Roofline(cost, peaks)
    points = []
    for rows in (1, 2, 4, 8, 16, 32):
        point = line.classify(rows, step_s(rows), context_tokens=60).to_dict()
        points.append({**point, "label": f"decode, {rows} rows"})
    prefill = line.classify(256, 0.52, context_tokens=128, outputs=1, sequences=1).to_dict()
    points.append({**prefill, "label": "prefill of 256 tokens"})
    return {
        "peaks": peaks.to_dict(),
        "model_cost": cost.to_dict(),
        "points": points,
        "verdict": "decode with 1 to 2 rows is memory-bound; with 8 to 32 it is compute-bound",
    }


def sample_document() -> dict[str, Any]:
    """All parts, nothing missing, no GPU; nothing in it is in two places as the same object."""
    sequential = runs("sequential", PROMPTS[:8], [64] * 8, 1, 3)
    static = runs("static", PROMPTS[:8], [64] * 8, SLOTS, 4)
    document = {
        "schema": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "interrupted": False,
        "environment": {
            "command": "batchcore lab sample-270m",
            "time": "2026-01-02T03:00:00+00:00",
            "cpu": "Sample CPU 2000",
            "num_cores": 4,
            "num_usable_cores": 2,
            "load_average_1min": 0.25,
            "devices": [
                {
                    "name": "CPU",
                    "description": "Sample CPU 2000",
                    "type": "cpu",
                    "backend": "CPU",
                    "memory_total_bytes": 8_589_934_592,
                    "memory_free_bytes": 6_442_450_944,
                }
            ],
            "platform": "Linux-sample",
            "python": "3.11.0",
            "build": {
                "version": "0.0.0-sample",
                "llama_cpp_version": "0.0.0",
                "llama_cpp_commit": "0000000",
                "cpu_features": ["avx2", "fma"],
                "backends": ["CPU"],
            },
        },
        "model": {
            "path": "/models/sample-270m.Q8_0.gguf",
            "file_name": "sample-270m.Q8_0.gguf",
            "sha256": "0" * 64,
            "description": "sample 270M Q8_0 (a made-up model)",
            "num_params": 268_098_176,
            "size_bytes": MODEL_BYTES,
            "memory_kind": "attention",
            "n_vocab": 262_144,
            "n_layer": 18,
        },
        "config": {
            "quick": False,
            "seed": SEED,
            "n_threads": 2,
            "repeats": REPEATS,
            "num_prompts": 8,
            "max_tokens": 64,
            "batch_sizes": [1, 2, 4, 8, 16, 32],
            "max_num_seqs": 32,
            "command": "batchcore lab sample-270m --out report",
        },
        "parts": {
            "sequential": {
                "runs": sequential,
                "single_s": simulate(PROMPTS[:1], [64], 1)["total_s"],
                "median": median(sequential),
                "utilisation": utilisation("sequential", PROMPTS[:8], [64] * 8, 1),
            },
            "static": {
                "runs": static,
                "batch_size": SLOTS,
                "median": median(static),
                "speedup": ratio(sequential, static, "output_tokens_per_s"),
                "parallel_ideal": SLOTS,
                "utilisation": utilisation("static", PROMPTS[:8], [64] * 8, SLOTS),
            },
            "batch_sizes": {
                "rows": batch_size_rows(),
                "recommended": {
                    "batch_size": 16,
                    "reason": "16 reach 92% of the best throughput; 32 take 1.8 times as long",
                    "rule": "the smallest batch size with at least 90% of the best throughput",
                },
            },
            "padding": padding_part(),
            "dynamic": dynamic_part(),
            "scheduler": scheduler_part(),
        },
        "monitor": {"static": monitor("static"), "continuous": monitor("continuous")},
        "roofline": roofline_part(),
    }
    return json.loads(json.dumps(document))
