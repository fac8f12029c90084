"""One user floods an engine that others use now and then: how long do the others wait?

Four users send requests at random times, together a part of what the machine can serve, or each one
as soon as the answer to the one before is there. Three runs per round, all with the same requests
and times of the four: alone; with a fifth user who hands in
everything at once at the start; and the same with everybody under one name, which is first come,
first served. Then what fairness costs: a pile of requests of eight users and the same pile of one,
in pairs.

    python benchmarks/flooding_user.py
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import batchcore as bc
import numpy as np
from common import distinct_prompt, models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore.model import Model

USERS = ("ann", "ben", "cleo", "dan")
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 32
PARAMS = bc.SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


async def others(
    engine: bc.AsyncEngine, prompts: list[list[int]], rate: float, seed: int, one_name: bool
) -> list[float]:
    """Seconds to the first token of each of their requests."""
    rng = random.Random(seed)
    found = []

    async def ask(prompt: list[int], user: str) -> None:
        handle = await engine.submit(prompt, PARAMS, user=user)
        output = await handle
        assert output.metrics is not None
        assert output.metrics.ttft_s is not None
        found.append(output.metrics.ttft_s)

    async def ask_in_turn(user: str, mine: list[list[int]]) -> None:
        for prompt in mine:
            await ask(prompt, user)

    tasks = []
    if rate > 0:
        for prompt in prompts:
            tasks.append(asyncio.create_task(ask(prompt, "" if one_name else rng.choice(USERS))))
            await asyncio.sleep(rng.expovariate(rate))
    else:
        for number, user in enumerate(USERS):
            mine = prompts[number :: len(USERS)]
            tasks.append(asyncio.create_task(ask_in_turn("" if one_name else user, mine)))
    await asyncio.gather(*tasks)
    return found


async def flood(engine: bc.AsyncEngine, prompts: list[list[int]], one_name: bool) -> None:
    """Everything at once, until cancelled."""
    user = "" if one_name else "mallory"
    await asyncio.gather(*(engine.generate(prompt, PARAMS, user=user) for prompt in prompts))


async def run(
    model: Model, options: Any, seed: int, how: str, load: float, rate: float
) -> list[float]:
    """One run; `how` is alone, fair or fifo, `rate` is `load` in requests per second."""
    prompts = [
        distinct_prompt(model, seed * 10_000 + i, PROMPT_TOKENS) for i in range(options.requests)
    ]
    flooding = [
        distinct_prompt(model, seed * 10_000 + 5000 + i, PROMPT_TOKENS)
        for i in range(int(1.3 * options.requests / (load or 0.5)))  # so that it lasts
    ]
    async with bc.AsyncEngine(model, max_num_seqs=options.slots, n_ctx=8192) as engine:
        await engine.generate(prompts[0][:16], PARAMS)
        task = None
        if how != "alone":
            task = asyncio.create_task(flood(engine, flooding, how == "fifo"))
            await asyncio.sleep(0.2)
        waits = await others(engine, prompts, rate, seed, how == "fifo")
        if task is not None:
            assert how == "fifo" or not task.done(), "the flood was over too early"
            task.cancel()
    return waits


def capacity(model: Model, options: Any) -> float:
    """Requests per second with all slots busy."""
    with bc.Engine(model, max_num_seqs=options.slots, n_ctx=8192) as engine:
        prompts = [distinct_prompt(model, 900_000 + i, PROMPT_TOKENS) for i in range(48)]
        engine.generate(prompts[:4], PARAMS)
        start = time.perf_counter()
        engine.generate(prompts[4:], PARAMS)
        return 44 / (time.perf_counter() - start)


def pile(model: Model, options: Any, seed: int, fair: bool) -> float:
    """Output tokens per second for a pile of requests of eight users or of one."""
    with bc.Engine(model, max_num_seqs=options.slots, n_ctx=8192) as engine:
        prompts = [
            distinct_prompt(model, 500_000 + seed * 1000 + i, PROMPT_TOKENS) for i in range(64)
        ]
        engine.generate(prompts[0][:16], PARAMS)
        start = time.perf_counter()
        handles = [
            engine.submit(prompt, PARAMS, user=str(i % 8) if fair else "")
            for i, prompt in enumerate(prompts)
        ]
        for handle in handles:
            handle.result()
        return 64 * OUTPUT_TOKENS / (time.perf_counter() - start)


def main() -> None:
    """Run all on each model and print medians over rounds."""
    parser = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--requests", type=int, default=40, help="of the four, per run")
    parser.add_argument(
        "--load",
        type=float,
        nargs="*",
        default=[0, 0.3, 0.6],
        help="of the four, in parts of capacity; 0: each sends one request after another",
    )
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows, costs = [], []
    for model in models(options):
        name = model.path.rsplit("/", 1)[-1]
        whole = capacity(model, options)
        for load in options.load:
            waits: dict[str, list[list[float]]] = {"alone": [], "fair": [], "fifo": []}
            for seed in range(options.rounds):
                for how, found in waits.items():
                    found.append(asyncio.run(run(model, options, seed, how, load, load * whole)))
            alone = [float(np.percentile(one, 95)) for one in waits["alone"]]
            for how, found in waits.items():
                p95 = [float(np.percentile(one, 95)) for one in found]
                ratios = [a / b for a, b in zip(p95, alone, strict=True)]
                rows.append(
                    {
                        "model": name,
                        "load of the four": load or "in turn",
                        "run": how,
                        "p50 ttft ms": 1e3 * statistics.median(x for one in found for x in one),
                        "p95 ttft ms": 1e3 * statistics.median(p95),
                        "p95 / alone": statistics.median(ratios),
                        "from": min(ratios),
                        "to": max(ratios),
                    }
                )
        pairs = [
            pile(model, options, seed, True) / pile(model, options, seed, False)
            for seed in range(options.rounds)
        ]
        costs.append(
            {
                "model": name,
                "capacity, requests/s": whole,
                "fair / first come": statistics.median(pairs),
                "from": min(pairs),
                "to": max(pairs),
            }
        )
    report("Time to the first token of four users", rows)
    report("Output tokens/s of a pile of eight users, against the same of one", costs)
    write_json(options, [*rows, *costs])


if __name__ == "__main__":
    main()
