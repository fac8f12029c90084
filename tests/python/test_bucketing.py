"""Bucketing strategies: what they cut, that nothing is lost, and that optimal is optimal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from batchcore import bucketing
from batchcore.bucketing import (
    Buckets,
    equal_count,
    fixed_edges,
    optimal,
    powers_of_two,
    token_budget,
)
from batchcore.errors import ConfigError, InvalidRequestError
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(0, 40), max_size=40)

STRATEGIES = {
    "equal_count": equal_count,
    "fixed_edges": lambda items, n, **kw: fixed_edges(items, range(0, 8 * n, 8), **kw),
    "powers_of_two": lambda items, n, **kw: powers_of_two(items, **kw),
    "token_budget": lambda items, n, **kw: token_budget(items, 30 * n, **kw),
    "optimal": optimal,
}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def groups(buckets: Buckets[Any]) -> list[list[Any]]:
    return list(buckets)


def sizes(buckets: Buckets[Any]) -> list[int]:
    return [len(bucket) for bucket in buckets.buckets]


# equal_count


def test_the_labs_example():
    requests = ["short", "medium length", "very long prompt here"]
    assert groups(equal_count(requests, 3)) == [[request] for request in requests]


def test_equal_count_sorts_and_cuts():
    assert groups(equal_count([9, 1, 8, 2, 7, 3], 3)) == [[1, 2], [3, 7], [8, 9]]


def test_a_remainder_makes_the_first_buckets_larger_and_no_extra_one():
    # The lab's code makes a fourth bucket of the remainder.
    assert groups(equal_count(range(8), 3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_fewer_items_than_buckets():
    # The lab's code divides by its bucket size of 0.
    assert groups(equal_count([2, 1], 5)) == [[1], [2]]
    assert groups(equal_count([2, 1], 10**30)) == [[1], [2]]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 60))
def test_equal_count_sizes_differ_by_one_at_most(lengths, num_buckets):
    found = sizes(equal_count(lengths, num_buckets))
    assert len(found) == min(num_buckets, len(lengths))
    assert not found or max(found) - min(found) <= 1


# fixed_edges, powers_of_two


def test_fixed_edges_take_their_own_length_and_leave_the_rest_to_a_last_bucket():
    assert groups(fixed_edges([5, 4, 11, 10, 0], [4, 10])) == [[0, 4], [5, 10], [11]]


def test_fixed_edges_without_items_make_no_bucket():
    assert groups(fixed_edges([5, 50], [1, 2, 10, 20, 10**30])) == [[5], [50]]


def test_powers_of_two():
    lengths = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 2**31 - 1]
    found = groups(powers_of_two(reversed(lengths)))
    assert found == [[0, 1], [2], [3, 4], [5, 8], [9, 16], [17], [2**31 - 1]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 2**31 - 1), max_size=40))
def test_powers_of_two_waste_less_than_half(lengths):
    for bucket in powers_of_two(lengths).buckets:
        assert bucket.padded_tokens < 2 * bucket.real_tokens


# token_budget


def test_token_budget_fills_from_the_longest():
    # 3 rows of 4 and 4 rows of 3 are 12 each; the next row would make 16 and 15.
    assert groups(token_budget([1, 2, 3, 4, 4, 3, 2, 1], 12)) == [[1], [1, 2, 2, 3], [3, 4, 4]]


def test_token_budget_takes_a_rectangle_of_exactly_the_budget():
    assert groups(token_budget([3, 3, 3, 3], 6)) == [[3, 3], [3, 3]]


def test_an_item_longer_than_the_budget_is_alone():
    assert groups(token_budget([1, 1, 50, 60], 10)) == [[1, 1], [50], [60]]


def test_empty_items_cost_no_budget():
    assert groups(token_budget([0, 0, 0, 0], 1)) == [[0, 0, 0, 0]]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200))
def test_token_budget_respects_the_budget(lengths, budget):
    for bucket in token_budget(lengths, budget).buckets:
        assert len(bucket) == 1 or bucket.padded_tokens <= budget


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 30))
def test_token_budget_has_as_few_buckets_as_can_be(lengths, budget):
    row = sorted(lengths)
    fewest = min(
        (
            len(cut)
            for cut in every_cut(row)
            if all(len(part) == 1 or len(part) * part[-1] <= budget for part in cut)
        ),
        default=0,
    )
    assert len(token_budget(lengths, budget)) == fewest


# optimal


def every_cut(row: list[int]) -> list[list[list[int]]]:
    """All ways to cut a row into pieces that are not empty."""
    found = []
    for count in range(len(row)):
        for places in itertools.combinations(range(1, len(row)), count):
            bounds = [0, *places, len(row)]
            found.append([row[a:b] for a, b in itertools.pairwise(bounds)])
    return found


def every_partition(items: list[int]) -> list[list[list[int]]]:
    """All ways to group items, neighbours in length or not."""
    if not items:
        return [[]]
    found = []
    for parts in every_partition(items[1:]):
        found.append([[items[0]], *parts])
        for place, part in enumerate(parts):
            found.append([*parts[:place], [items[0], *part], *parts[place + 1 :]])
    return found


def padded(parts: list[list[int]]) -> int:
    return sum(len(part) * max(part) for part in parts)


def test_optimal_cuts_where_the_gaps_are():
    lengths = [100, 1, 2, 101, 50, 3]
    assert groups(optimal(lengths, 3)) == [[1, 2, 3], [50], [100, 101]]
    # In two, 50 is worth less than the second of the long ones: 3 x 3 + 3 x 101 = 312 against
    # 4 x 50 + 2 x 101 = 402.
    assert groups(optimal(lengths, 2)) == [[1, 2, 3], [50, 100, 101]]
    assert groups(optimal(lengths, 1)) == [[1, 2, 3, 50, 100, 101]]


def test_optimal_weighs_how_many_there_are_of_a_length():
    assert groups(optimal([10] * 9 + [11, 25], 2)) == [[10] * 9 + [11], [25]]
    assert groups(optimal([10] * 9 + [19, 25], 2)) == [[10] * 9, [19, 25]]


def test_optimal_needs_no_more_buckets_than_there_are_lengths():
    buckets = optimal([7, 3, 7, 3, 5], 100)
    assert groups(buckets) == [[3, 3], [5], [7, 7]]
    assert buckets.padded_tokens == buckets.real_tokens == 25


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=9), st.integers(1, 9))
def test_optimal_equals_every_cut_tried(lengths, num_buckets):
    buckets = optimal(lengths, num_buckets)
    assert len(buckets) <= num_buckets
    tried = (padded(cut) for cut in every_cut(sorted(lengths)) if len(cut) <= num_buckets)
    assert buckets.padded_tokens == min(tried)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 6))
def test_optimal_equals_every_grouping_tried(lengths, num_buckets):
    tried = (padded(cut) for cut in every_partition(lengths) if len(cut) <= num_buckets)
    assert optimal(lengths, num_buckets).padded_tokens == min(tried)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 12))
def test_no_strategy_pads_less_than_optimal_with_as_many_buckets(lengths, num):
    for name, strategy in STRATEGIES.items():
        other = strategy(lengths, num)
        assert optimal(lengths, len(other)).padded_tokens <= other.padded_tokens, name


def test_optimal_equals_plain_dynamic_programming_over_many_lengths():
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 400, 900)
    values, counts = np.unique(lengths, return_counts=True)
    before = [0, *np.cumsum(counts).tolist()]
    costs = [0] + [10**9] * len(values)
    for num_buckets in range(1, 9):
        costs = [0] + [
            min(costs[i] + int(values[p - 1]) * (before[p] - before[i]) for i in range(p))
            for p in range(1, len(costs))
        ]
        assert optimal(lengths, num_buckets).padded_tokens == costs[-1]


# what all share


@each_strategy
@settings(deadline=None)
@given(lengths=LENGTHS, num=st.integers(1, 9))
def test_every_item_once_ascending_and_stable(strategy, lengths, num):
    buckets = strategy(lengths, num)
    assert buckets.order.tolist() == sorted(range(len(lengths)), key=lengths.__getitem__)
    assert [i for bucket in buckets.buckets for i in bucket.indices] == buckets.order.tolist()
    assert [x for group in buckets for x in group] == sorted(lengths)
    assert groups(buckets) == [bucket.lengths.tolist() for bucket in buckets.buckets]
    assert all(sizes(buckets))
    assert len(buckets) == len(buckets.buckets)
    assert buckets.real_tokens == sum(lengths)
    assert buckets.padded_tokens == sum(len(group) * max(group) for group in buckets)


@each_strategy
@settings(deadline=None)
@given(lengths=LENGTHS, num=st.integers(1, 9))
def test_restore_is_the_way_back(strategy, lengths, num):
    items = [("x" * length, place) for place, length in enumerate(lengths)]
    buckets = strategy(items, num, key=lambda item: len(item[0]))
    assert buckets.restore(groups(buckets)) == items
    flat = [item for group in buckets for item in group]
    assert buckets.restore_flat(flat) == items
    assert [flat[place] for place in buckets.inverse] == items


@each_strategy
def test_nothing_makes_no_buckets(strategy):
    for nothing in ([], (), np.array([], np.int64), np.array([])):
        buckets = strategy(nothing, 3)
        assert (len(buckets), groups(buckets), buckets.buckets) == (0, [], ())
        assert (buckets.real_tokens, buckets.padded_tokens) == (0, 0)
        assert buckets.restore([]) == buckets.restore_flat([]) == []


@each_strategy
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_integer_arrays_are_lengths(strategy, dtype):
    lengths = [3, 100, 0, 7, 7, 1]
    array = np.array(lengths, dtype)
    buckets = strategy(array, 2)
    assert groups(buckets) == groups(strategy(lengths, 2))
    assert [type(item) for group in buckets for item in group] == [int] * 6
    array[:] = 0
    assert buckets.restore(groups(buckets)) == lengths


def test_lengths_above_16_bits_sort_as_well():
    assert groups(optimal([70_000, 5, 65_536, 65_535], 3)) == [[5], [65_535, 65_536], [70_000]]


def test_lengths_come_from_len_from_integers_or_from_key():
    assert equal_count(["abc", "", "ab"], 1).lengths.tolist() == [0, 2, 3]
    assert equal_count([[1, 2], (3,), np.zeros(5), 4, np.int32(0)], 1).lengths.tolist() == [
        *(0, 1, 2, 4, 5),
    ]
    assert groups(equal_count(iter([3, 1]), 1, key=lambda x: -x + 10)) == [[3, 1]]
    assert groups(equal_count(np.array([3, 1]), 1, key=lambda x: 10 - x)) == [[3, 1]]
    assert equal_count(np.zeros((2, 7)), 1).lengths.tolist() == [7, 7]


def test_a_bucket_knows_its_rectangle():
    (bucket,) = equal_count([3, 10, 3], 1).buckets
    assert (bucket.indices.tolist(), bucket.lengths.tolist()) == ([0, 2, 1], [3, 3, 10])
    assert (len(bucket), bucket.longest, bucket.real_tokens, bucket.padded_tokens) == (
        3,
        10,
        16,
        30,
    )


def test_results_are_read_only():
    buckets = equal_count(np.array([2, 1]), 2)
    arrays = [buckets.order, buckets.lengths, buckets.bounds, buckets.inverse, buckets.items]
    for array in [*arrays, buckets.buckets[0].indices, buckets.buckets[0].lengths]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9


def test_restore_wants_a_result_for_each_item():
    buckets = equal_count([1, 2, 3], 2)
    with pytest.raises(ConfigError, match="don't fit"):
        buckets.restore([["a"], ["b", "c"]])
    with pytest.raises(ConfigError, match="1 sequences of results don't fit the sizes of 2"):
        buckets.restore([["a", "b", "c"]])
    with pytest.raises(ConfigError, match="2 results don't fit 3 items"):
        buckets.restore_flat(["a", "b"])


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_bad_counts(value):
    for strategy, name in (
        (equal_count, "num_buckets"),
        (optimal, "num_buckets"),
        (token_budget, "budget"),
    ):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            strategy([1, 2], value)


@pytest.mark.parametrize("edges", [[], [3, 3], [4, 3], [-1, 3], [1.0], [True]])
def test_bad_edges(edges):
    with pytest.raises(ConfigError, match="edges must be"):
        fixed_edges([1, 2], edges)


@each_strategy
@pytest.mark.parametrize(
    "items",
    [
        [1, -1],
        [1, 2**31],
        [1, 2**70],
        [1, True],
        [1, 1.5],
        [None],
        np.array([1, -1]),
        np.array([2**63], np.uint64),
        np.array([1.0]),
        np.array([True]),
    ],
    ids=repr,
)
def test_bad_lengths(strategy, items):
    with pytest.raises(InvalidRequestError, match="a length"):
        strategy(items, 2)


@pytest.mark.parametrize("value", [-1, 0.5, None, "1"])
def test_bad_keys(value):
    with pytest.raises(InvalidRequestError, match="a length"):
        equal_count(["a"], 2, key=lambda item: value)


@each_strategy
def test_a_million_lengths(strategy):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1, 10**6).astype(np.int64), 8192)
    buckets = strategy(lengths, 64)
    assert np.array_equal(lengths[buckets.order], np.sort(lengths))
    assert np.array_equal(buckets.order[buckets.inverse], np.arange(10**6))
    assert buckets.real_tokens == lengths.sum()


def test_a_hundred_thousand_distinct_lengths():
    lengths = np.random.default_rng(0).permutation(100_000)
    buckets = optimal(lengths, 4)
    # Even lengths are best cut in four equal parts.
    assert sizes(buckets) == [25_000] * 4


def test_all_is_what_is_public():
    assert set(bucketing.__all__) == {"Bucket", "Buckets", *STRATEGIES}
