"""Figures of a run from the times of its requests."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from batchcore.bench import Quantiles, RequestRecord, Slo, summarize
from batchcore.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


def record(index=0, **values):
    """Three tokens, the first after 100 ms, the others after 40 and 60 ms more."""
    return RequestRecord(
        **{
            "index": index,
            "submitted_s": 0.0,
            "num_prompt_tokens": 10,
            "completion_tokens": (3,),
            "ttft_s": 0.1,
            "itl_s": (0.04, 0.06),
            "latency_s": 0.2,
            "finish_reason": "length",
            **values,
        }
    )


REFUSED = RequestRecord(index=7, submitted_s=1.0, num_prompt_tokens=10, error="QueueFullError")


def test_figures_of_one_request():
    one = record(due_s=0.5, submitted_s=0.75)
    assert one.tpot_s == pytest.approx(0.05)
    assert one.lag_s == 0.25
    assert one.num_output_tokens == 3
    assert one.is_completed
    assert one.to_dict()["itl_s"] == (0.04, 0.06)
    assert one.to_dict()["tpot_s"] == pytest.approx(0.05)
    json.dumps(one.to_dict())


def test_tpot_is_that_of_the_longest_completion():
    assert record(completion_tokens=(2, 5, 3)).tpot_s == pytest.approx(0.1 / 4)
    assert record(completion_tokens=(2, 5, 3)).num_output_tokens == 10


def test_a_single_token_has_no_time_per_token():
    assert record(completion_tokens=(1,), itl_s=()).tpot_s is None
    assert record(completion_tokens=()).tpot_s is None
    assert record(latency_s=None).tpot_s is None


@pytest.mark.parametrize(
    ("values", "is_completed"),
    [
        ({"finish_reason": "stop"}, True),
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "timeout"}, False),
        ({"finish_reason": "cancelled"}, False),
        ({"finish_reason": None}, False),
        ({"error": "DecodeError"}, False),
    ],
)
def test_which_requests_are_completed(values, is_completed):
    assert record(**values).is_completed is is_completed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft:200 itl:50", Slo(ttft_ms=200, itl_ms=50)),
        (["ttft:200", "itl:50"], Slo(ttft_ms=200, itl_ms=50)),
        (" tpot:12.5,\n e2el:1e3 ", Slo(tpot_ms=12.5, e2el_ms=1000)),
    ],
)
def test_objectives_are_read(text, expected):
    assert Slo.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no SLO given"),
        ([], "no SLO given"),
        ("p99:200", "unknown SLO 'p99:200'; known: ttft, itl, tpot, e2el"),
        ("200", "unknown SLO '200'"),
        ("ttft", "'ttft' is not of the form ttft:MILLISECONDS"),
        ("ttft:", "is not of the form"),
        ("ttft: 200", "is not of the form"),
        ("ttft:200ms", "is not of the form"),
        ("ttft:1 ttft:2", "the SLO ttft is given twice"),
        ("itl:0", "itl must be a number of ms above 0, not 0"),
        ("itl:-1", "itl must be"),
        ("e2el:nan", "e2el must be"),
        ("e2el:inf", "e2el must be"),
    ],
)
def test_other_objectives_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "values", "is_met"),
    [
        ("ttft:100 itl:60 tpot:50.1 e2el:200", {}, True),
        ("ttft:99", {}, False),
        ("itl:59", {}, False),  # one gap of 60 ms, though their mean is 50
        ("tpot:49", {}, False),
        ("e2el:199", {}, False),
        ("itl:1 tpot:1", {"completion_tokens": (1,), "itl_s": ()}, True),
        ("ttft:1000", {"finish_reason": "timeout"}, False),
        ("ttft:1000", {"error": "DecodeError"}, False),
        ("itl:1000", {"ttft_s": None}, False),
    ],
)
def test_which_requests_meet_their_objectives(text, values, is_met):
    assert Slo.parse(text).is_met(record(**values)) is is_met


def test_summary_with_literal_values():
    records = [
        record(0),
        record(1, ttft_s=0.3, latency_s=0.4, num_cached_tokens=4, submitted_s=0.02),
        record(2, completion_tokens=(1,), itl_s=(), latency_s=0.1, finish_reason="stop"),
        record(3, completion_tokens=(2,), itl_s=(9.0,), ttft_s=9.0, finish_reason="timeout"),
        REFUSED,
    ]
    summary = summarize(records, 2.0, num_requests=6, slo=Slo(ttft_ms=200))
    assert (summary.num_requests, summary.num_completed, summary.num_failed) == (6, 3, 2)
    assert summary.errors == {"timeout": 1, "QueueFullError": 1}
    # The refused request's prompt was never computed; the tokens of the late one were.
    assert summary.num_prompt_tokens == 40
    assert summary.num_cached_tokens == 4
    assert summary.num_output_tokens == 3 + 3 + 1 + 2
    assert summary.requests_per_s == 1.5
    assert summary.output_tokens_per_s == 4.5
    assert summary.total_tokens_per_s == 24.5
    assert summary.goodput_requests_per_s == 1.0
    assert summary.ttft_s.mean == pytest.approx(0.5 / 3)
    assert summary.ttft_s.p50 == 0.1
    assert summary.itl_s.p50 == pytest.approx(0.05)
    assert summary.tpot_s.p99 == pytest.approx(0.05)
    assert summary.e2el_s.p95 == pytest.approx(0.38)
    assert summary.lag_s.mean == pytest.approx(1.02 / 5)


def test_metrics_have_the_names_that_others_use():
    metrics = summarize([record()], 2.0).to_metrics()
    assert {name: value for name, value in metrics.items() if name.endswith("e2el_ms")} == {
        "mean_e2el_ms": 200.0,
        "p50_e2el_ms": 200.0,
        "p95_e2el_ms": 200.0,
        "p99_e2el_ms": 200.0,
    }
    assert metrics["mean_itl_ms"] == pytest.approx(50.0)
    assert metrics["output_tokens_per_s"] == 1.5
    assert metrics["goodput_requests_per_s"] is None
    assert list(metrics)[:4] == ["num_requests", "num_completed", "num_failed", "total_s"]
    assert len(metrics) == 11 + 5 * 4


def test_nothing_at_all():
    summary = summarize([], 0.0, slo=Slo(ttft_ms=1))
    assert summary.requests_per_s == summary.goodput_requests_per_s == 0.0
    assert math.isnan(summary.ttft_s.p99)
    metrics = summary.to_metrics()
    assert metrics["p99_ttft_ms"] is None
    json.dumps(metrics, allow_nan=False)
    assert summarize([REFUSED], 1.0).to_metrics()["mean_e2el_ms"] is None


@given(st.lists(st.none() | st.floats(0, 1e6)))
def test_quantiles_are_numpys(values):
    found = Quantiles.of(values)
    present = [value for value in values if value is not None]
    if not present:
        assert all(math.isnan(value) for value in (found.mean, found.p50, found.p95, found.p99))
        return
    assert found.mean == pytest.approx(np.mean(present))
    expected = np.percentile(present, [50, 95, 99])
    assert [found.p50, found.p95, found.p99] == pytest.approx(list(expected), abs=1e-6)


@given(st.lists(st.sampled_from([record(), record(ttft_s=0.5), REFUSED])), st.floats(0.1, 10))
def test_goodput_is_part_of_the_throughput(records, total_s):
    summary = summarize(records, total_s, slo=Slo(ttft_ms=200))
    assert summary.num_completed + summary.num_failed == len(records)
    assert summary.goodput_requests_per_s <= summary.requests_per_s
    assert summary.num_good == records.count(record())
