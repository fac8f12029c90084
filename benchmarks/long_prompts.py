"""Eight streams decode while long prompts arrive: how long does a stream wait for its next token?

`throughput` takes prompts in whole micro-batches, as engines without stall protection do, and is
what the others are compared with. Rows named by a factor use `target_itl_ms` of that many times the
step that the streams take alone. Runs are interleaved over rounds.

    python benchmarks/long_prompts.py
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import batchcore as bc
import numpy as np
from common import distinct_prompt, models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore.model import Model

NUM_STREAMS = 8


class Stream(threading.Thread):
    """Reads one stream and keeps the time of every token."""

    def __init__(self, engine: bc.Engine, prompt: list[int], max_tokens: int) -> None:
        """Submit the prompt."""
        super().__init__()
        params = bc.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.handle = engine.submit(prompt, params)
        self.times: list[float] = []

    def run(self) -> None:
        """Read until it ends."""
        for delta in self.handle:
            self.times.extend([time.perf_counter()] * len(delta.token_ids))


def measure(
    model: Model, policy: Any, target_itl_ms: float | None, options: Any
) -> dict[str, float]:
    """One run: streams alone, then with prompts arriving one after another."""
    with bc.Engine(
        model,
        max_num_seqs=NUM_STREAMS + 4,
        n_ctx=16_384,
        prefill_policy=policy,
        target_itl_ms=target_itl_ms,
        prefix_caching=False,
        kv_layout="unified",
    ) as engine:
        streams = [
            Stream(engine, distinct_prompt(model, 100 + i, 64), 4000) for i in range(NUM_STREAMS)
        ]
        for stream in streams:
            stream.start()
        while not all(stream.times for stream in streams):
            time.sleep(0.05)
        alone_from = time.perf_counter()
        time.sleep(options.alone_s)
        begin = time.perf_counter()
        first_tokens = []
        for i in range(options.prompts):
            start = time.perf_counter()
            arriving = distinct_prompt(model, i, options.prompt_tokens)
            one = bc.SamplingParams(max_tokens=1, temperature=0)
            engine.submit(arriving, one).result()
            first_tokens.append(time.perf_counter() - start)
        end = time.perf_counter()
        for stream in streams:
            stream.handle.cancel()
            stream.join()

    def gaps(since: float, until: float) -> list[float]:
        found: list[float] = []
        for stream in streams:
            inside = [t for t in stream.times if since <= t <= until]
            found.extend(np.diff(inside))
        return found

    during = gaps(begin, end)
    num_tokens = len(during) + NUM_STREAMS + options.prompts * options.prompt_tokens
    return {
        "itl alone ms": 1e3 * statistics.median(gaps(alone_from, begin)),
        "p50 ms": 1e3 * float(np.percentile(during, 50)),
        "p99 ms": 1e3 * float(np.percentile(during, 99)),
        "max ms": 1e3 * max(during),
        "ttft s": statistics.mean(first_tokens),
        "output tok/s": len(during) / (end - begin),
        "tok/s in all": num_tokens / (end - begin),
    }


def main() -> None:
    """Run every policy on each model and print medians."""
    parser = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--alone-s", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.5, 2.0, 4.0])
    options = parser.parse_args()
    rows = []
    for model in models(options):
        results: dict[str, list[dict[str, float]]] = {}
        alone_ms = 0.0
        for _ in range(options.rounds):
            for policy in ("throughput", "balanced", "latency"):
                figures = measure(model, policy, None, options)
                alone_ms = figures["itl alone ms"]
                results.setdefault(policy, []).append(figures)
            for factor in options.factors:
                figures = measure(model, "balanced", factor * alone_ms, options)
                results.setdefault(f"x{factor:g}", []).append(figures)
        for policy, each in results.items():
            medians = {key: statistics.median(one[key] for one in each) for key in each[0]}
            rows.append({"model": model.path.rsplit("/", 1)[-1], "policy": policy, **medians})
    report("Long prompts beside streams", rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()
