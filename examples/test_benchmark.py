"""A project's own benchmark: pytest examples/test_benchmark.py --benchmark-only.

Needs pytest-benchmark (`pip install 'batchcore[bench]'`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from batchcore import SamplingParams
from batchcore.bench import Workload

if TYPE_CHECKING:
    from batchcore import Engine

_seeds = itertools.count()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_decode(batchcore_engine: Engine, benchmark: Any, batch_size: int) -> None:
    """Output tokens per second by batch size."""
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    produced = []

    def new_prompts() -> tuple[tuple[Any, ...], dict[str, Any]]:
        # New in every round: no cache may answer for the round before.
        workload = Workload.generate(
            batchcore_engine.model,
            num_prompts=batch_size,
            prompt_tokens=32,
            output_tokens=32,
            seed=next(_seeds),
        )
        return ([request.prompt for request in workload],), {}

    def run(prompts: list[Any]) -> None:
        outputs = batchcore_engine.generate(prompts, params)
        produced.append(sum(len(out.outputs[0].token_ids) for out in outputs))

    benchmark.pedantic(run, setup=new_prompts, rounds=3, warmup_rounds=1)
    assert produced == [32 * batch_size] * 4
    benchmark.extra_info["output tokens per s"] = produced[-1] / benchmark.stats.stats.median
