"""The kernel bound: its arithmetic by hand, and the measurement once on a small model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from batchcore import Model
from batchcore.bench.metrics import RequestRecord
from batchcore.bench.peers.kernel_bound import (
    ShapeTable,
    bound_s,
    measure_shapes,
    occupancy,
    positions,
)
from batchcore.testing import synthetic_gguf

TABLE = ShapeTable(0.001, 1e-6, {1: 0.010, 4: 0.020, 8: 0.060, 12: 0.048})


def record(index: int, due_s: float, ttft_s: float, itl_s: tuple[float, ...]) -> RequestRecord:
    return RequestRecord(
        index=index,
        arrival_s=0.0,
        due_s=due_s,
        submitted_s=due_s,
        num_prompt_tokens=10,
        num_cached_tokens=0,
        completion_tokens=(1 + len(itl_s),),
        ttft_s=ttft_s,
        itl_s=itl_s,
        latency_s=ttft_s + sum(itl_s),
        finish_reason="length",
    )


@pytest.mark.parametrize(
    ("rows", "call_s"),
    [
        (1, 0.010),
        (2, 0.010 + 0.010 / 3),  # on the line between 1 and 4
        (4, 0.020),
        (8, 0.048),  # filled up to 12, which is faster
        (7, 0.048),
        (24, 0.096),  # beyond the table: two calls of 12
    ],
)
def test_a_token_costs_its_part_of_the_best_call(rows: int, call_s: float) -> None:
    assert TABLE.seconds_per_token(rows) == pytest.approx(call_s / rows)


def test_occupancy_counts_who_decodes_when_a_token_comes() -> None:
    first = record(0, 0.0, 1.0, (1.0, 1.0, 1.0))  # tokens at 1, 2, 3, 4
    second = record(1, 1.5, 1.0, (0.5, 0.25))  # at 2.5, 3, 3.25
    only_one_token = record(2, 0.0, 2.0, ())
    # Alone at 2 and at 4; both at 3; and the second's last, while the first still decodes.
    assert occupancy([first, second, only_one_token]) == {1: 2, 2: 3}


def test_bound_adds_prompts_and_tokens_up() -> None:
    assert bound_s(TABLE, 500, 100_000, {1: 10, 12: 24}) == pytest.approx(
        0.5 + 0.1 + 0.1 + 24 * 0.004
    )


def test_positions_of_tokens_that_were_computed() -> None:
    whole = record(0, 0.0, 1.0, ())  # 10 tokens: 0 + 1 + … + 9
    cached = dataclasses.replace(whole, num_cached_tokens=7)
    assert positions([whole, cached]) == 45 + 7 + 8 + 9


def test_shapes_are_measured_with_llama_cpp(tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "tiny.gguf", n_layer=1, n_embd=64)
    table = measure_shapes(
        Model(path),
        n_threads=1,
        rows=(1, 2),
        chunks=(4, 8),
        context_tokens=8,
        depth=8,
        repetitions=1,
    )
    assert table.prefill_s_per_token > 0
    assert table.attention_s_per_position >= 0
    assert table.decode_s.keys() == {1, 2}
    assert all(math.isfinite(time) and time > 0 for time in table.decode_s.values())
