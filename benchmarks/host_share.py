"""What of a step in which 16 sequences decode is spent outside of llama.cpp.

The engine is stepped by hand, so that each step's time is known: planning, sampling, text, stop
strings, accounting and handing results over, against the time inside of llama.cpp. Steps that
compute prompts are not counted.

    python benchmarks/host_share.py --json host_share.json
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

from batchcore import Engine, SamplingParams
from common import distinct_prompt, models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore import Model

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 40, top-p 0.95, T 0.8": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1),
    "T 0.8 over the whole vocabulary": SamplingParams(temperature=0.8, seed=1),
}
CELLS = 512
PARTS = ("plan", "sample", "text", "publish")


def measure(model: Model, name: str, batch: int, tokens: int, kv_layout: Any) -> dict[str, Any]:
    """Step a batch of sequences to its end."""
    params = dataclasses.replace(SAMPLINGS[name], max_tokens=tokens, ignore_eos=True)
    outside_ms, inside_ms = [], []
    parts = dict.fromkeys(PARTS, 0.0)
    with Engine(
        model,
        max_num_seqs=batch,
        n_ctx=batch * CELLS,
        max_sequence_tokens=CELLS,
        kv_layout=kv_layout,
        autostart=False,
    ) as engine:
        handles = [
            engine.submit(distinct_prompt(model, seed, 128), params) for seed in range(batch)
        ]
        before = engine.stats()
        while not all(handle.finished for handle in handles):
            start = time.perf_counter()
            engine.step()
            wall_s = time.perf_counter() - start
            after = engine.stats()
            rows = after.num_decode_rows - before.num_decode_rows
            prompts = after.num_prefill_tokens - before.num_prefill_tokens
            if rows == batch and prompts == 0:
                inside_s = after.decode_s - before.decode_s
                inside_ms.append(inside_s * 1e3)
                outside_ms.append((wall_s - inside_s) * 1e3)
                for part in PARTS:
                    parts[part] += getattr(after, f"{part}_s") - getattr(before, f"{part}_s")
            before = after
    shares = [out / (out + inside) for out, inside in zip(outside_ms, inside_ms, strict=True)]
    return {
        "model": model.description,
        "sampling": name,
        "steps": len(shares),
        "llama.cpp ms": statistics.median(inside_ms),
        "outside ms": statistics.median(outside_ms),
        **{f"{part} ms": parts[part] / len(shares) * 1e3 for part in PARTS},
        "share outside %": statistics.median(shares) * 100,
    }


def main() -> None:
    """Measure each model with each way of sampling."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--kv-layout", choices=["auto", "unified", "streams"], default="auto")
    given = options.parse_args()
    rows = [
        measure(model, name, given.batch, given.tokens, given.kv_layout)
        for model in models(given)
        for name in SAMPLINGS
    ]
    report("A decode step, outside of llama.cpp", rows)
    write_json(given, rows)


if __name__ == "__main__":
    main()
