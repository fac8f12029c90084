"""SamplingParams: checked when made, immutable, defaults in one place."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from batchcore import SamplingParams
from batchcore.errors import InvalidRequestError

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", NAN),
        ("frequency_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", [7]),
        ("stop_token_ids", [-1]),
        ("logprobs", -1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: NAN}),
        ("n", 0),
        ("n", None),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("stop", 7),
        ("stop", "\ud800"),
        ("stop_token_ids", 5),
        ("logit_bias", [1]),
        ("logit_bias", {1: "x"}),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        SamplingParams(min_tokens=17)


def test_a_single_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


def test_minus_one_means_all_for_top_k():
    assert SamplingParams(top_k=-1).top_k == 0


def test_immutable_comparable_and_picklable():
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).stop == ("a",)
