"""Twenty thousand requests at four times what the machine can serve: what becomes of them?

Requests of many users and all tiers arrive at random times through an event loop, some with
timeouts, against a bounded queue. Every one must end in exactly one way; a refusal must come at
once; memory must not grow with what was refused.

    python benchmarks/overload.py
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import batchcore as bc
import numpy as np
import psutil
from batchcore.errors import QueueFullError, RequestTimeoutError
from common import models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore.model import Model

SLOTS = 16
MAX_QUEUED = 128
PROMPT_TOKENS = 8
PARAMS = bc.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
TIERS = ("interactive", "standard", "batch")


def prompt_of(model: Model, number: int) -> list[int]:
    """Eight tokens that differ at the first."""
    return [100 + (number * 8 + i) % (model.n_vocab - 100) for i in range(PROMPT_TOKENS)]


def capacity(model: Model) -> float:
    """Requests per second with all slots busy."""
    with bc.Engine(model, max_num_seqs=SLOTS, n_ctx=4096) as engine:
        prompts = [prompt_of(model, i) for i in range(272)]
        engine.generate(prompts[:16], PARAMS)
        start = time.perf_counter()
        engine.generate(prompts[16:], PARAMS)
        return 256 / (time.perf_counter() - start)


async def run(model: Model, options: Any, rate: float) -> dict[str, Any]:
    """All arrivals, in an open loop."""
    rng = random.Random(1)
    ends: Counter[str] = Counter()
    refused_ms: list[float] = []
    hints_s: list[float] = []
    process = psutil.Process()
    policy = bc.SchedulingPolicy(max_queued_requests_per_user=32, shed=True)

    async def one(engine: bc.AsyncEngine, number: int) -> None:
        timeout = rng.choice([None, 0.5, 5.0])
        start = time.perf_counter()
        try:
            handle = await engine.submit(
                prompt_of(model, number),
                PARAMS,
                priority=rng.choice(TIERS),
                user=f"user {min(int(rng.paretovariate(1.0)), 5000)}",
                timeout=timeout,
            )
        except QueueFullError as error:
            refused_ms.append(1e3 * (time.perf_counter() - start))
            hints_s.append(error.retry_after_s)
            ends["refused"] += 1
            return
        try:
            output = await handle
        except RequestTimeoutError:
            ends["timeout"] += 1
            return
        ends[output.outputs[0].finish_reason or "none"] += 1

    async with bc.AsyncEngine(
        model, max_num_seqs=SLOTS, n_ctx=4096, max_queued_requests=MAX_QUEUED, policy=policy
    ) as engine:
        await engine.generate(prompt_of(model, 0), PARAMS)
        before = process.memory_info().rss
        most = before
        most_waiting = 0
        due = start = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        for number in range(options.requests):
            due += rng.expovariate(options.load * rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one(engine, number + 1))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if number % 100 == 0:
                most = max(most, process.memory_info().rss)
                most_waiting = max(most_waiting, engine.stats().num_waiting)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
        assert await engine.drain(60)
        stats = engine.stats()
    assert sum(ends.values()) == options.requests, "a request has no end, or two"
    assert ends["refused"] == stats.num_refused
    assert min(hints_s) > 0
    assert most_waiting <= MAX_QUEUED
    assert stats.num_running == stats.num_waiting == stats.num_active_cells == 0
    finished = stats.num_finished
    assert finished["length"] == ends["length"] + 1
    assert finished["timeout"] == ends["timeout"]
    return {
        "requests": options.requests,
        "offered / capacity": options.requests / seconds / rate,
        "served": ends["length"],
        "timeout": ends["timeout"],
        "refused": ends["refused"],
        "of them shed": stats.num_shed,
        "refusal p50 ms": float(np.percentile(refused_ms, 50)),
        "refusal p99 ms": float(np.percentile(refused_ms, 99)),
        "refusal max ms": max(refused_ms),
        "served/s / capacity": ends["length"] / seconds / rate,
        "memory grew by MiB": (most - before) / 2**20,
        "s": seconds,
    }


def main() -> None:
    """Run on each model."""
    parser = make_parser(__doc__, ["smollm2-135m"])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--load", type=float, default=4.0, help="arrivals, in parts of capacity")
    options = parser.parse_args()
    rows = []
    for model in models(options):
        rate = capacity(model)
        figures = asyncio.run(run(model, options, rate))
        rows.append({"model": model.path.rsplit("/", 1)[-1], "capacity/s": rate, **figures})
    report("Overload", rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()
