"""Padding accounting: the lab's formula, rectangles, static batches, strategies side by side."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
from batchcore import bucketing
from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.padding import (
    PaddedGroup,
    SlotCounts,
    StaticBatch,
    calculate_padding_waste,
    compare_strategies,
    padding_report,
    static_batches,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(0, 60), max_size=40)


# calculate_padding_waste


def test_the_labs_formula_by_hand():
    # Longest 100 + 50; real 60 + 90 + 150 = 300 of 3 x 150 = 450.
    assert calculate_padding_waste([10, 40, 100], 50) == pytest.approx(100 / 3)
    assert calculate_padding_waste([10, 40, 100], 0) == 50.0
    assert calculate_padding_waste([7], 50) == 0.0
    assert calculate_padding_waste([7, 7], 50) == 0.0


def test_the_labs_formula_on_inputs_like_the_labs():
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(5, 50) for _ in range(8)]
        padded = (max(lengths) + 50) * 8
        actual = sum(length + 50 for length in lengths)
        assert calculate_padding_waste(lengths, 50) == (padded - actual) / padded * 100


def test_nothing_to_pad_is_no_waste():
    assert calculate_padding_waste([0, 0, 0], 0) == 0.0


def test_arrays_and_iterators_are_lengths():
    assert calculate_padding_waste(np.array([10, 40, 100], np.uint8), 200) == pytest.approx(
        100 * 150 / 900
    )
    assert calculate_padding_waste(iter([10, 40, 100]), 0) == 50.0


def test_no_lengths_are_an_error():
    with pytest.raises(ConfigError, match="at least one length"):
        calculate_padding_waste([], 50)


@pytest.mark.parametrize("max_tokens", [-1, 1.5, None, True])
def test_bad_max_tokens(max_tokens):
    with pytest.raises(ConfigError, match="max_tokens_per_seq must be"):
        calculate_padding_waste([1], max_tokens)
    with pytest.raises(ConfigError, match="max_tokens must be"):
        compare_strategies([1], num_buckets=1, max_tokens=max_tokens)
    with pytest.raises(ConfigError, match="max_tokens must be"):
        padding_report(bucketing.equal_count([1], 1), max_tokens=max_tokens)


@pytest.mark.parametrize("lengths", [["two words"], [[1, 2]], [-1], [1.5], np.ones((2, 2), int)])
def test_lengths_are_integers_not_what_has_a_length(lengths):
    for call in (
        lambda: calculate_padding_waste(lengths, 5),
        lambda: static_batches(lengths, [1], 1),
        lambda: static_batches([1], lengths, 1),
        lambda: compare_strategies(lengths, num_buckets=1),
        lambda: StaticBatch(4, lengths, [1]),
    ):
        with pytest.raises(InvalidRequestError, match="a length"):
            call()


# padding_report


def test_report_of_buckets():
    report = padding_report(bucketing.equal_count([10, 1, 4, 2], 2))
    assert report.buckets == report.batches
    assert report.buckets == (
        PaddedGroup(num_rows=2, longest=2, real_tokens=3, padded_tokens=4),
        PaddedGroup(num_rows=2, longest=10, real_tokens=14, padded_tokens=20),
    )
    assert report.total == PaddedGroup(num_rows=4, longest=10, real_tokens=17, padded_tokens=24)
    assert (report.total.wasted_tokens, report.total.waste_pct) == (7, pytest.approx(700 / 24))


def test_report_of_batches_in_buckets():
    buckets = bucketing.fixed_edges([1, 2, 3, 4, 10], [4])
    report = padding_report(buckets, batch_size=3, max_tokens=5)
    assert report.batches == (
        PaddedGroup(num_rows=1, longest=6, real_tokens=6, padded_tokens=6),
        PaddedGroup(num_rows=3, longest=9, real_tokens=24, padded_tokens=27),
        PaddedGroup(num_rows=1, longest=15, real_tokens=15, padded_tokens=15),
    )
    assert report.buckets == (
        PaddedGroup(num_rows=4, longest=9, real_tokens=30, padded_tokens=33),
        PaddedGroup(num_rows=1, longest=15, real_tokens=15, padded_tokens=15),
    )


def test_report_of_nothing():
    report = padding_report(bucketing.equal_count([], 3), batch_size=2)
    assert (report.buckets, report.batches) == ((), ())
    assert report.total.to_dict() == {
        "num_rows": 0,
        "longest": 0,
        "real_tokens": 0,
        "padded_tokens": 0,
        "wasted_tokens": 0,
        "waste_pct": 0.0,
    }


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 50), st.integers(0, 9))
def test_report_adds_up(lengths, num_buckets, batch_size, max_tokens):
    buckets = bucketing.optimal(lengths, num_buckets)
    report = padding_report(buckets, max_tokens=max_tokens, batch_size=batch_size)
    batches = [
        [length + max_tokens for length in group[max(0, start) : start + batch_size]]
        for group in buckets
        for start in range(-(-len(group) % batch_size), len(group), batch_size)
    ]
    assert [(b.num_rows, b.longest, b.real_tokens, b.padded_tokens) for b in report.batches] == [
        (len(b), max(b), sum(b), len(b) * max(b)) for b in batches
    ]
    assert len(report.buckets) == len(buckets)
    assert sum(bucket.padded_tokens for bucket in report.buckets) == report.total.padded_tokens


# StaticBatch, static_batches


def test_a_static_batch_by_hand():
    batch = StaticBatch(4, [10, 4, 6], [8, 2, 5])
    assert (batch.num_steps, batch.slot_steps) == (8, 32)
    assert (batch.busy_slot_steps, batch.idle_slot_steps) == (15, 17)
    assert batch.slot_waste == 17 / 32
    assert (batch.prompt_tokens, batch.padded_prompt_tokens) == (20, 30)
    assert batch.prompt_waste == pytest.approx(1 / 3)
    assert (batch.prompt_lengths, batch.indices) == ((10, 4, 6), ())
    assert batch == pickle.loads(pickle.dumps(batch))
    assert batch == StaticBatch(np.int64(4), np.array([10, 4, 6]), np.array([8, 2, 5]))


def test_counts_of_a_run_have_the_same_ratios():
    batch = StaticBatch(4, [10, 4, 6], [8, 2, 5])
    names = ("num_steps", "slot_steps", "busy_slot_steps", "prompt_tokens", "padded_prompt_tokens")
    counted = SlotCounts(**{name: getattr(batch, name) for name in names})
    assert (counted.slot_waste, counted.prompt_waste) == (batch.slot_waste, batch.prompt_waste)


def test_a_batch_without_rows_or_outputs_wastes_nothing():
    for batch in (StaticBatch(0, [], []), StaticBatch(4, [], []), StaticBatch(2, [0, 0], [0, 0])):
        assert (batch.slot_steps, batch.slot_waste, batch.prompt_waste) == (0, 0.0, 0.0)


def test_bad_static_batches():
    with pytest.raises(ConfigError, match="3 rows don't fit 2 slots"):
        StaticBatch(2, [1, 2, 3], [1, 2, 3])
    with pytest.raises(ConfigError, match="2 prompts need as many output lengths"):
        StaticBatch(2, [1, 2], [1])
    with pytest.raises(ConfigError, match="indices or none"):
        StaticBatch(2, [1, 2], [1, 2], [0])
    with pytest.raises(ConfigError, match="num_slots must be"):
        StaticBatch(-1, [], [])


def test_static_batches_in_the_order_of_arrival():
    report = static_batches([5, 3, 9], [2, 4, 1], 2)
    assert report.batches == (
        StaticBatch(2, [5, 3], [2, 4], [0, 1]),
        StaticBatch(1, [9], [1], [2]),
    )
    assert (report.num_steps, report.slot_steps) == (5, 9)
    assert (report.busy_slot_steps, report.idle_slot_steps) == (7, 2)
    assert report.slot_waste == 2 / 9
    assert (report.prompt_tokens, report.padded_prompt_tokens) == (17, 19)


def test_rows_that_a_partial_batch_lacks_are_idle_if_slots_are_said():
    report = static_batches([5, 3, 9], [2, 4, 1], 2, num_slots=2)
    assert [batch.num_slots for batch in report.batches] == [2, 2]
    assert (report.slot_steps, report.idle_slot_steps) == (10, 3)
    assert static_batches([5, 3, 9], [2, 4, 1], 2, num_slots=4).slot_steps == 20
    # A prompt that is not there is not padded.
    assert report.padded_prompt_tokens == 19


def test_static_batches_of_buckets():
    outputs = [9, 1, 8, 2, 1]
    report = static_batches([5, 5, 5, 5, 7], outputs, 2, bucketing.fixed_edges(outputs, [3]))
    assert [batch.output_lengths for batch in report.batches] == [(1,), (1, 2), (8, 9)]
    assert [batch.indices for batch in report.batches] == [(1,), (4, 3), (2, 0)]
    assert [batch.prompt_lengths for batch in report.batches] == [(5,), (7, 5), (5, 5)]


def test_static_batches_of_nothing():
    report = static_batches([], [], 4, num_slots=4)
    assert (report.batches, report.slot_steps, report.slot_waste) == ((), 0, 0.0)
    assert static_batches([], [], 4, bucketing.optimal([], 2)) == report


def test_bad_static_batch_calls():
    with pytest.raises(ConfigError, match="2 prompt lengths, 1 output lengths"):
        static_batches([1, 2], [1], 2)
    with pytest.raises(ConfigError, match="buckets of 3 items are not of the same requests"):
        static_batches([1, 2], [1, 2], 2, bucketing.equal_count([1, 2, 3], 1))
    for batch_size in (0, -1, 2.0, None):
        with pytest.raises(ConfigError, match="batch_size must be"):
            static_batches([1], [1], batch_size)
    with pytest.raises(ConfigError, match="num_slots must be at least 4, not 3"):
        static_batches([1], [1], 4, num_slots=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.integers(1, 9))
def test_static_batches_equal_a_run_step_by_step(requests, batch_size):
    prompts, outputs = [p for p, _ in requests], [o for _, o in requests]
    report = static_batches(prompts, outputs, batch_size, num_slots=batch_size)
    steps = busy = 0
    for start in range(0, len(requests), batch_size):
        left = outputs[start : start + batch_size]
        while any(left):
            steps += 1
            busy += sum(1 for tokens in left if tokens)
            left = [max(0, tokens - 1) for tokens in left]
    assert (report.num_steps, report.slot_steps) == (steps, steps * batch_size)
    assert (report.busy_slot_steps, report.busy_slot_steps) == (busy, sum(outputs))
    assert sorted(i for batch in report.batches for i in batch.indices) == list(range(len(prompts)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 50))
def test_the_labs_formula_is_one_static_batch(lengths, max_tokens):
    (none, *_) = compare_strategies(lengths, num_buckets=1, max_tokens=max_tokens)
    assert none.waste_pct == calculate_padding_waste(lengths, max_tokens)
    ends = [length + max_tokens for length in lengths]
    report = static_batches(lengths, ends, len(lengths))
    assert report.slot_waste * 100 == pytest.approx(none.waste_pct)


# compare_strategies


def test_strategies_side_by_side():
    reports = compare_strategies(
        [1, 9, 2, 10, 1, 3], num_buckets=2, budget=20, edges=[1, 5], batch_size=None
    )
    assert [
        (r.strategy, r.num_buckets, r.num_batches, r.padded_tokens, r.saved_tokens) for r in reports
    ] == [
        ("none", 1, 1, 60, 0),
        ("equal_count", 2, 2, 36, 24),  # 3 x 2 + 3 x 10
        ("powers_of_two", 4, 4, 27, 33),  # 2 x 1 + 2 + 3 + 2 x 10
        ("optimal", 2, 2, 32, 28),  # 4 x 3 + 2 x 10
        ("fixed_edges", 3, 3, 28, 32),  # 2 x 1 + 2 x 3 + 2 x 10
        ("token_budget", 2, 2, 32, 28),
    ]
    assert {report.real_tokens for report in reports} == {26}
    assert reports[0].waste_pct == pytest.approx(100 * 34 / 60)
    assert reports[1].waste_pct == pytest.approx(100 * 10 / 36)
    assert reports[1].saved_pct_points == pytest.approx(100 * 34 / 60 - 100 * 10 / 36)
    assert reports[0].saved_pct_points == 0.0


def test_strategies_in_static_batches():
    none, equal, *_ = compare_strategies(
        [1, 9, 2, 10, 1, 3], num_buckets=2, batch_size=2, max_tokens=1
    )
    # Of two as they come: 2 x 10 + 2 x 11 + 2 x 4. In buckets: 2 + 2 x 3, 4 + 2 x 11.
    assert (none.num_buckets, none.num_batches, none.padded_tokens) == (1, 3, 50)
    assert (equal.num_buckets, equal.num_batches, equal.padded_tokens) == (2, 4, 34)
    assert none.real_tokens == equal.real_tokens == 32


def test_bucketing_can_pad_more_than_the_order_of_arrival():
    # As they come 3 x 1 + 10, sorted 1 + (1, 1, 10) as 3 x 10.
    none, equal, *_ = compare_strategies([1, 1, 1, 10], num_buckets=1, batch_size=3)
    assert (none.padded_tokens, equal.padded_tokens, equal.saved_tokens) == (13, 31, -18)
    assert equal.saved_pct_points < 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 9), st.randoms())
def test_no_order_takes_fewer_steps_than_sorted(outputs, batch_size, rng):
    ordered = static_batches(outputs, outputs, batch_size, bucketing.equal_count(outputs, 1))
    rng.shuffle(outputs)
    assert ordered.num_steps <= static_batches(outputs, outputs, batch_size).num_steps


def test_strategies_over_nothing():
    reports = compare_strategies([], num_buckets=3, budget=5, edges=[1], batch_size=2)
    assert [report.strategy for report in reports] == [
        *("none", "equal_count", "powers_of_two", "optimal", "fixed_edges", "token_budget"),
    ]
    for report in reports:
        counts = (report.num_buckets, report.num_batches, report.padded_tokens, report.waste_pct)
        assert counts == (0, 0, 0, 0.0)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 50) | st.none(), st.integers(0, 9))
def test_strategies_agree_with_their_reports(lengths, num, batch_size, max_tokens):
    made = {
        "equal_count": bucketing.equal_count(lengths, num),
        "powers_of_two": bucketing.powers_of_two(lengths),
        "optimal": bucketing.optimal(lengths, num),
        "fixed_edges": bucketing.fixed_edges(lengths, [num, 3 * num]),
        "token_budget": bucketing.token_budget(lengths, 10 * num),
    }
    reports = compare_strategies(
        *(lengths,),
        num_buckets=num,
        edges=[num, 3 * num],
        budget=10 * num,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    assert [report.strategy for report in reports] == ["none", *made]
    for report in reports[1:]:
        expected = padding_report(
            made[report.strategy], max_tokens=max_tokens, batch_size=batch_size
        )
        assert report.num_buckets == len(expected.buckets)
        assert report.num_batches == len(expected.batches)
        assert report.real_tokens == expected.total.real_tokens
        assert report.padded_tokens == expected.total.padded_tokens


def test_bad_comparisons():
    for options, message in (
        ({"num_buckets": 0}, "num_buckets"),
        ({"num_buckets": 1, "budget": 0}, "budget"),
        ({"num_buckets": 1, "edges": []}, "edges"),
        ({"num_buckets": 1, "batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_strategies([1, 2], **options)


# JSON, size


def test_reports_are_ready_for_json():
    lengths = np.array([3, 1, 2])
    comparison = [report.to_dict() for report in compare_strategies(lengths, num_buckets=2)]
    assert json.loads(json.dumps(comparison))[1] == {
        "strategy": "equal_count",
        "num_buckets": 2,
        "num_batches": 2,
        "real_tokens": 6,
        "padded_tokens": 7,
        "wasted_tokens": 1,
        "waste_pct": pytest.approx(100 / 7),
        "saved_tokens": 2,
        "saved_pct_points": pytest.approx(100 / 3 - 100 / 7),
    }
    static = static_batches(lengths, lengths, 2, num_slots=2).to_dict()
    assert json.loads(json.dumps(static)) == static
    assert static["slot_steps"] == 10
    assert static["batches"][1] == {
        "num_slots": 2,
        "num_steps": 2,
        "slot_steps": 4,
        "busy_slot_steps": 2,
        "idle_slot_steps": 2,
        "slot_waste": 0.5,
        "prompt_tokens": 2,
        "padded_prompt_tokens": 2,
        "prompt_waste": 0.0,
        "prompt_lengths": [2],
        "output_lengths": [2],
        "indices": [2],
    }
    report = padding_report(bucketing.optimal(lengths, 2)).to_dict()
    assert json.loads(json.dumps(report)) == report
    assert [group["padded_tokens"] for group in report["buckets"]] == [1, 6]


def test_a_million_lengths():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1, 10**6).astype(np.int64), 8192)
    real = int(lengths.sum()) + 50 * 10**6
    none, *others = compare_strategies(
        lengths, num_buckets=8, budget=16_384, edges=[100, 1000], max_tokens=50, batch_size=16
    )
    assert none.num_batches == 62_500
    assert {report.real_tokens for report in others} == {real}
    assert all(real < report.padded_tokens < none.padded_tokens for report in others)
