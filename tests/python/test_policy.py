"""What a scheduling policy accepts, and what it becomes."""

from __future__ import annotations

import copy
import math
import pickle

import batchcore as bc
import pytest
from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.policy import check_timeout, check_user, encode_user

ODD_NAMES = ["", " ", "alice\n", "\0", "İ", "\ud800", "💥" * 200, "a" * 256, "None", "../x"]


def test_the_default_names_three_tiers_and_keeps_numbers():
    policy = bc.SchedulingPolicy()
    assert [policy.priority_of(name) for name in ("interactive", "standard", "batch")] == [-1, 0, 1]
    assert policy.priority_of(-(2**31)) == -(2**31)
    assert policy.native_options()["tier_limits"] == []


def test_tiers_with_limits_reach_the_engine():
    policy = bc.SchedulingPolicy(
        tiers=[bc.Tier("gold", 0, reserved_seqs=2), bc.Tier("bulk", 5, max_num_seqs=3)],
        aging_s=None,
        user_weights={"a": 2},
        shed=True,
    )
    options = policy.native_options()
    assert options["tier_limits"] == [(0, 0, 2), (5, 3, 0)]
    assert options["aging_s"] == 0.0
    assert options["user_weights"] == {b"a": 2}
    assert options["shed"] is True


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 1.0, True, None, math.nan, b"batch"])
def test_what_is_no_priority_is_refused(priority):
    with pytest.raises(InvalidRequestError, match="32-bit integer"):
        bc.SchedulingPolicy().priority_of(priority)


def test_an_unknown_tier_is_refused_with_those_that_there_are():
    with pytest.raises(InvalidRequestError, match="'gold', only interactive, standard, batch"):
        bc.SchedulingPolicy().priority_of("gold")


@pytest.mark.parametrize(
    "options",
    [
        {"aging_s": 0},
        {"aging_s": -1.0},
        {"aging_s": math.nan},
        {"aging_s": math.inf},
        {"user_weights": {"a": 0}},
        {"user_weights": {"a": -1}},
        {"user_weights": {"a": math.inf}},
        {"user_weights": {"a": "2"}},
        {"user_weights": {3: 1.0}},
        {"prompt_token_cost": -0.1},
        {"output_token_cost": math.nan},
        {"max_queued_requests_per_user": 0},
        {"max_queued_tokens_per_user": 1.5},
        {"tiers": [bc.Tier("a", 0), bc.Tier("a", 1)]},
        {"tiers": [bc.Tier("a", 0), bc.Tier("b", 0)]},
    ],
)
def test_a_policy_that_can_not_work_is_refused(options):
    with pytest.raises(ConfigError):
        bc.SchedulingPolicy(**options)


@pytest.mark.parametrize(
    "arguments",
    [("", 0), (3, 0), ("a", 2**31), ("a", 0.5), ("a", 0, 0), ("a", 0, -1), ("a", 0, None, -1)],
)
def test_a_tier_that_can_not_work_is_refused(arguments):
    with pytest.raises(ConfigError):
        bc.Tier(*arguments)


def test_a_policy_is_a_value():
    weights = {"a": 2.0}
    policy = bc.SchedulingPolicy(user_weights=weights, tiers=[bc.Tier("x", 3)])
    weights["a"] = 9.0
    assert policy.user_weights["a"] == 2.0
    with pytest.raises(TypeError):
        policy.user_weights["a"] = 1.0
    for twin in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert twin == policy
        assert twin is not policy


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_short_text_is_a_user(name):
    check_user(name)
    assert [encode_user(other) for other in ODD_NAMES].count(encode_user(name)) == 1


@pytest.mark.parametrize("name", ["a" * 257, None, 7, b"a", ["a"]])
def test_what_is_no_user_is_refused(name):
    with pytest.raises(InvalidRequestError, match="user must"):
        check_user(name)


@pytest.mark.parametrize("value", [0, 0.0, -1, -math.inf, math.nan, "5", True, [1]])
def test_what_is_no_time_to_wait_is_refused(value):
    with pytest.raises(InvalidRequestError, match="timeout must be above 0 seconds"):
        check_timeout("timeout", value)


@pytest.mark.parametrize("value", [None, 1, 0.001, math.inf])
def test_what_is_a_time_to_wait_is_accepted(value):
    check_timeout("timeout", value)
