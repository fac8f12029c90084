"""Three ways to run the same prompts over an engine: one by one, in static batches, continuously.

They differ only in when a request is handed to the engine. Streaming, delivery and clock are the
same, so that a difference between two results is one of batching. All requests are taken to arrive
together when the run starts, as with a user who has a pile of prompts: every time here is counted
from the start of the run, waiting included.

The runners drive an event loop of their own: call them from a thread that has none running. Ctrl-C
ends a run, and the result says so and has what was finished. `params` is one set for all prompts or
one for each; `on_delta` gets every piece of text with the index of its prompt.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from batchcore.async_engine import AsyncEngine
from batchcore.batching import cut_batches
from batchcore.errors import ConfigError
from batchcore.params import SamplingParams
from batchcore.submission import as_params

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from batchcore.batching import Bucketing
    from batchcore.engine import Engine
    from batchcore.outputs import RequestOutput, StreamDelta
    from batchcore.submission import Prompt

    OnDelta = Callable[[int, StreamDelta], None]
    Params = SamplingParams | Sequence[SamplingParams] | None

__all__ = [
    "RequestResult",
    "RunResult",
    "percentile",
    "run_continuous",
    "run_sequential",
    "run_static",
    "spread_max_tokens",
    "warm_up",
]

Mode = Literal["sequential", "static", "continuous"]

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One finished request of a run."""

    index: int
    """Of its prompt."""
    output: RequestOutput
    ttft_s: float | None
    """From the start of the run until its first token was here; None where it produced none."""
    latency_s: float
    """From the start of the run until the last of it was here."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were produced, of all its completions."""
        return sum(len(completion.token_ids) for completion in self.output.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Counts, times and what was produced, ready for JSON."""
        metrics = self.output.metrics
        return {
            "index": self.index,
            "num_prompt_tokens": len(self.output.prompt_token_ids),
            "num_output_tokens": self.num_output_tokens,
            "ttft_s": self.ttft_s,
            "latency_s": self.latency_s,
            "tpot_s": metrics.tpot_s if metrics else None,
            "completions": [
                {
                    "finish_reason": completion.finish_reason,
                    "token_ids": completion.token_ids,
                    "text": completion.text,
                }
                for completion in self.output.outputs
            ],
        }


@dataclass(slots=True)
class RunResult:
    """What a run did, all of it or as far as it came."""

    mode: Mode
    num_requests: int
    """Asked for."""
    requests: list[RequestResult] = field(default_factory=list)
    """Those that finished, in the order of the prompts."""
    total_s: float = 0.0
    """From the start of the run until its end."""
    interrupted: bool = False
    """Ended by Ctrl-C, so that `requests` may be incomplete."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were produced by the requests that finished."""
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens over the time of the whole run."""
        return self.num_output_tokens / self.total_s if self.total_s else 0.0

    @property
    def latencies_s(self) -> list[float]:
        """Of the requests that finished, in the order of the prompts."""
        return [request.latency_s for request in self.requests]

    @property
    def mean_latency_s(self) -> float:
        """NaN where no request finished."""
        values = self.latencies_s
        return sum(values) / len(values) if values else math.nan

    def latency_percentile_s(self, percent: float) -> float:
        """NaN where no request finished."""
        return percentile(self.latencies_s, percent)

    def to_dict(self) -> dict[str, Any]:
        """Totals and every request, ready for JSON."""
        latency_s: dict[str, float | None] = {"mean": None, "p50": None, "p95": None, "p99": None}
        if self.requests:
            latency_s["mean"] = self.mean_latency_s
            for percent in (50, 95, 99):
                latency_s[f"p{percent}"] = self.latency_percentile_s(percent)
        return {
            "mode": self.mode,
            "interrupted": self.interrupted,
            "num_requests": self.num_requests,
            "num_finished": len(self.requests),
            "total_s": self.total_s,
            "num_output_tokens": self.num_output_tokens,
            "output_tokens_per_s": self.output_tokens_per_s,
            "latency_s": latency_s,
            "requests": [request.to_dict() for request in self.requests],
        }


def run_sequential(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: Params = None,
    *,
    on_delta: OnDelta | None = None,
) -> RunResult:
    """Run one prompt after another: each is handed in when the one before has ended."""
    return _run("sequential", engine, prompts, params, 1, on_delta)


def run_static(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: Params = None,
    *,
    batch_size: int,
    bucketing: Bucketing | None = None,
    on_delta: OnDelta | None = None,
) -> RunResult:
    """Run batches of `batch_size`: the next is handed in when all of the one before have ended.

    `bucketing` groups prompts by length before batches are cut, as in `Engine.generate`.
    """
    return _run("static", engine, prompts, params, batch_size, on_delta, bucketing)


def run_continuous(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: Params = None,
    *,
    on_delta: OnDelta | None = None,
) -> RunResult:
    """Hand everything in at once: whenever a sequence ends, the engine refills its slot."""
    return _run("continuous", engine, prompts, params, max(1, len(prompts)), on_delta)


def spread_max_tokens(max_tokens: int, count: int) -> list[int]:
    """Output lengths for `count` prompts, from `max_tokens` down to a quarter of it.

    The same for every call, evenly spread also over any few neighbours (multiples of the golden
    ratio modulo 1), so that every static batch has short and long ones.
    """
    low = max(1, max_tokens // 4)
    width = max_tokens - low + 1
    return [max_tokens - int(width * (index * _GOLDEN % 1)) for index in range(count)]


def warm_up(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Run a few tokens, alone and batched, so that no run pays for what happens only once.

    That is reading the weights from disk, and allocating what llama.cpp computes in.
    """
    few = [engine.tokenize(prompt)[:16] for prompt in prompts[: engine.max_num_seqs]]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    engine.generate(few[:1], params)
    engine.generate(few, params)


def percentile(values: Iterable[float], percent: float) -> float:
    """Percentile with linear interpolation, as numpy's default; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _run(
    mode: Mode,
    engine: Engine,
    prompts: Sequence[Prompt],
    params: Params,
    batch_size: int,
    on_delta: OnDelta | None,
    bucketing: Bucketing | None = None,
) -> RunResult:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    jobs = list(zip(prompts, as_params(params, len(prompts)), strict=True))
    lengths = [len(engine.tokenize(prompt)) for prompt in prompts] if bucketing else [0] * len(jobs)
    batches = cut_batches(lengths, batch_size, bucketing)
    result = RunResult(mode, num_requests=len(jobs))
    try:
        asyncio.run(_run_batches(engine, jobs, batches, result, on_delta))
    except KeyboardInterrupt:
        result.interrupted = True
    result.requests.sort(key=lambda request: request.index)
    return result


async def _run_batches(
    engine: Engine,
    jobs: Sequence[tuple[Prompt, SamplingParams]],
    batches: Sequence[Sequence[int]],
    result: RunResult,
    on_delta: OnDelta | None,
) -> None:
    async with AsyncEngine(engine) as async_engine:
        start = time.perf_counter()

        async def run_one(index: int) -> None:
            handle = await async_engine.submit(*jobs[index])
            ttft_s = None
            async for delta in handle:
                if ttft_s is None and delta.token_ids:
                    ttft_s = time.perf_counter() - start
                if on_delta is not None:
                    on_delta(index, delta)
            latency_s = time.perf_counter() - start
            result.requests.append(RequestResult(index, handle.output, ttft_s, latency_s))

        try:
            for indices in batches:
                await _run_together([run_one(index) for index in indices])
        finally:
            result.total_s = time.perf_counter() - start


async def _run_together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them in this order; if one fails, or this is cancelled, none is left running."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
