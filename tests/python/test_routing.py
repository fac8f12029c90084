"""Routing policies: tables with literal expectations, and what must hold for any loads."""

from __future__ import annotations

import pytest
from batchcore.errors import ConfigError, EngineError
from batchcore.routing.policies import (
    LeastOutstanding,
    PrefixAware,
    ReplicaLoad,
    RoundRobin,
    RoutingPolicy,
)
from hypothesis import given
from hypothesis import strategies as st

IDLE = ReplicaLoad(0, 0)
POLICIES = [RoundRobin, LeastOutstanding, PrefixAware]


def loads_of(*tokens):
    return [None if count is None else ReplicaLoad(count, 1) for count in tokens]


@pytest.mark.parametrize("policy", POLICIES)
def test_they_keep_the_contract(policy):
    assert isinstance(policy(), RoutingPolicy)
    with pytest.raises(EngineError, match="no replica is in service"):
        policy().choose([1], [None, None])
    with pytest.raises(EngineError):
        policy().choose([1], [])


def test_round_robin_takes_turns_and_skips_who_is_out():
    policy = RoundRobin()
    assert [policy.choose([], [IDLE] * 3) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [policy.choose([], [IDLE, IDLE, None]) for _ in range(3)] == [0, 1, 0]
    assert [policy.choose([], [None, IDLE, IDLE]) for _ in range(3)] == [1, 2, 1]
    policy.record([1], 0)
    policy.forget(0)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([ReplicaLoad(10, 1), ReplicaLoad(9, 5)], 1),
        ([ReplicaLoad(9, 2), ReplicaLoad(9, 1)], 1),
        ([ReplicaLoad(9, 1), ReplicaLoad(9, 1)], 0),
        ([None, ReplicaLoad(999, 9), None], 1),
        ([None, ReplicaLoad(7, 9), ReplicaLoad(6, 9)], 2),
    ],
)
def test_least_outstanding(loads, expected):
    assert LeastOutstanding().choose([1, 2], loads) == expected


SYSTEM = list(range(10))


def small(**options):
    return PrefixAware(
        **{"block_tokens": 4, "max_imbalance_tokens": 100, "max_imbalance_ratio": 2.0} | options
    )


def test_the_longest_match_wins():
    policy = small()
    policy.record(SYSTEM[:5], 1)  # one block
    policy.record(SYSTEM, 2)  # two
    assert [policy.num_matching_tokens([*SYSTEM, 99], replica) for replica in range(3)] == [0, 4, 8]
    assert policy.choose([*SYSTEM, 99], loads_of(0, 0, 0)) == 2
    assert policy.choose([*SYSTEM[:6], 99, 99, 99], loads_of(0, 50, 60)) == 1  # both hold one
    assert policy.choose([*SYSTEM, 99], loads_of(0, 0, None)) == 1
    assert policy.choose([7, *SYSTEM], loads_of(5, 4, 6)) == 1  # nobody holds it
    assert policy.choose(SYSTEM[:3], loads_of(5, 4, 6)) == 1  # less than a block


def test_blocks_are_known_by_all_before_them():
    policy = small()
    policy.record([1, 1, 1, 1, 2, 2, 2, 2], 0)
    assert policy.num_matching_tokens([3, 3, 3, 3, 2, 2, 2, 2], 0) == 0
    assert policy.num_matching_tokens([2, 2, 2, 2], 0) == 0


def test_names_of_blocks_are_the_same_in_every_process():
    (name,) = PrefixAware(block_tokens=2)._blocks([1, 2, 3])
    assert name.hex() == "f59df9f51bfcb52f7ae49756810ec78b"


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ((0, 100), 1),  # exactly the absolute bound
        ((0, 101), 0),
        ((400, 800), 1),  # above it, but no more than twice the least
        ((400, 801), 0),
        ((None, 9999), 1),  # alone
        ((90, 101), 1),
    ],
)
def test_an_overloaded_replica_is_passed_over(loads, expected):
    policy = small()
    policy.record(SYSTEM, 1)
    assert policy.choose(SYSTEM, loads_of(*loads)) == expected


def test_where_the_best_is_overloaded_the_next_best_match_is_taken():
    policy = small()
    policy.record(SYSTEM, 0)
    policy.record(SYSTEM[:4], 1)
    assert policy.choose(SYSTEM, loads_of(500, 50, 0)) == 1


def test_a_replica_that_was_rebuilt_holds_nothing():
    policy = small()
    policy.record(SYSTEM, 1)
    policy.forget(1)
    policy.forget(5)  # never heard of
    assert policy.choose(SYSTEM, loads_of(0, 0)) == 0
    assert policy.num_blocks == 0


def test_ends_of_prompts_are_forgotten_before_their_beginnings():
    policy = small(max_blocks=3)
    policy.record([1] * 8, 0)
    policy.record([2] * 8, 0)
    assert policy.num_matching_tokens([1] * 8, 0) == 4
    assert policy.num_matching_tokens([2] * 8, 0) == 8
    policy.record([1] * 4, 0)  # used again, so the other's end goes next
    policy.record([3] * 4, 0)
    assert policy.num_matching_tokens([1] * 4, 0) == 4
    assert policy.num_matching_tokens([2] * 8, 0) == 4


def test_a_prompt_longer_than_the_memory_keeps_its_beginning():
    policy = small(max_blocks=2)
    policy.record(list(range(400)), 0)
    assert policy.num_blocks == 2
    assert policy.num_matching_tokens(list(range(400)), 0) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"block_tokens": 0},
        {"max_blocks": True},
        {"max_imbalance_tokens": -1},
        {"max_imbalance_ratio": 0.5},
        {"max_imbalance_ratio": float("inf")},
        {"max_imbalance_ratio": float("nan")},
    ],
)
def test_what_can_not_work_is_refused(options):
    with pytest.raises(ConfigError):
        PrefixAware(**options)


a_load = st.builds(ReplicaLoad, st.integers(0, 2000), st.integers(0, 9))
some_loads = st.lists(st.none() | a_load, min_size=1, max_size=5).filter(
    lambda loads: any(load is not None for load in loads)
)
# Few tokens and one repeated beginning, so that prompts do share prefixes.
prompts = st.builds(
    lambda common, rest: [1] * common + rest,
    st.integers(0, 30),
    st.lists(st.integers(0, 2), max_size=12),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(requests=st.lists(st.tuples(prompts, some_loads), max_size=20))
def test_nothing_is_sent_to_a_replica_out_of_service(policy, requests):
    policy = policy()
    for prompt, loads in requests:
        replica = policy.choose(prompt, loads)
        assert loads[replica] is not None
        policy.record(prompt, replica)


@given(requests=st.lists(st.tuples(prompts, some_loads), max_size=30))
def test_prefixes_never_break_the_bounds(requests):
    policy = small(max_blocks=5)
    for prompt, loads in requests:
        replica = policy.choose(prompt, loads)
        tokens = [load.outstanding_tokens for load in loads if load is not None]
        chosen = loads[replica].outstanding_tokens
        assert chosen <= min(tokens) + 100 or chosen <= 2 * min(tokens)
        policy.record(prompt, replica)
        assert policy.num_blocks <= 5 * 5
        # What was sent last is known as far as there is room.
        assert policy.num_matching_tokens(prompt, replica) == min(len(prompt) // 4, 5) * 4


@given(requests=st.lists(st.tuples(prompts, some_loads), max_size=20))
def test_the_same_requests_are_routed_the_same_way(requests):
    def route():
        policy = small()
        for prompt, loads in requests:
            replica = policy.choose(prompt, loads)
            policy.record(prompt, replica)
            yield replica

    assert list(route()) == list(route())
