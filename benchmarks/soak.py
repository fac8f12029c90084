"""Thousands of requests with random cancels: is every one of them ended, and every cell given back?

The account of the KV memory is proven against llama.cpp's own view after every step. For the same
over a simulated model, with ten thousand requests and failures, see tests/cpp/soak_test.cpp.

    python benchmarks/soak.py --requests 600
"""

from __future__ import annotations

import collections
import random
import threading
import time
from typing import Any

import batchcore as bc
import psutil
from common import distinct_prompt, models, report, write_json
from common import parser as make_parser


def main() -> None:
    """Run both layouts."""
    parser = make_parser(__doc__, ["smollm2-135m"])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--cancels", type=float, default=0.3, help="share of requests cancelled")
    parser.add_argument("--callers", type=int, default=24, help="threads")
    options = parser.parse_args()
    rows = []
    for model in models(options):
        rows.extend(soak(model, layout, options) for layout in ("unified", "streams"))
    report("Soak", rows)
    write_json(options, rows)


def soak(model: bc.Model, layout: Any, options: Any) -> dict[str, Any]:
    """Send all requests from several threads and count how they end."""
    ends: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()
    todo = iter(range(options.requests))
    start = time.perf_counter()
    with bc.Engine(
        model,
        max_num_seqs=16,
        n_ctx=2048 if layout == "unified" else 4096,
        kv_layout=layout,
        check_integrity=True,
    ) as engine:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                with lock:
                    number = next(todo, None)
                if number is None:
                    return
                prompt = distinct_prompt(model, rng.randrange(40), rng.randint(1, 150))
                params = bc.SamplingParams(
                    max_tokens=rng.randint(1, 40), seed=number, n=rng.choice([1, 1, 1, 2])
                )
                handle = engine.submit(prompt, params)
                if rng.random() < options.cancels:
                    time.sleep(rng.random() * 0.5)
                    handle.cancel()
                handle.result()
                with lock:
                    ends[handle.output.outputs[0].finish_reason or "none"] += 1

        process = psutil.Process()
        warm = None
        threads = [threading.Thread(target=work, args=(i,)) for i in range(options.callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1.0)
                if warm is None and sum(ends.values()) > options.requests / 4:
                    warm = process.memory_info().rss
        stats = engine.stats()
        rss = process.memory_info().rss
    return {
        "model": model.path.rsplit("/", 1)[-1],
        "layout": layout,
        "requests": options.requests,
        "ended": sum(ends.values()),
        **{reason: ends[reason] for reason in ("stop", "length", "cancelled", "error", "none")},
        "running after": stats.num_running + stats.num_waiting,
        "active cells after": stats.num_active_cells,
        "preemptions": stats.num_preemptions,
        "cut short": stats.num_interrupts,
        "RSS growth MB": (rss - (warm or rss)) / 1e6,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
