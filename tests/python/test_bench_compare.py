"""Paired comparisons, and the files that results are kept in."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import statistics
from pathlib import Path

import pytest
from batchcore.bench import (
    BenchmarkResult,
    BenchmarkRun,
    compare_pairs,
    compare_results,
    find_differences,
    interleave,
)
from batchcore.bench.compare import better_direction, interleaved_order
from batchcore.bench.result import write_text_atomically
from batchcore.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

positive = st.floats(1e-3, 1e6)


def result(*metrics, kind="serve", **values):
    runs = tuple(BenchmarkRun(one) for one in metrics)
    return BenchmarkResult(
        **{"kind": kind, "config": {}, "runs": runs, "environment": {"cpu": "x"}, **values}
    )


def test_ratio_with_literal_values():
    ratio = compare_pairs([10.0, 20.0, 40.0], [11.0, 30.0, 48.0])
    assert ratio.ratios == pytest.approx((1.1, 1.5, 1.2))
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.2, 1.1, 1.5))
    # The median of three picks is the smallest ratio with a chance of 7/27, far above 2.5%.
    assert (ratio.ci_low, ratio.ci_high) == pytest.approx((1.1, 1.5))
    assert ratio.excludes_one
    assert not ratio.has_enough_pairs


def test_the_interval_is_narrower_than_the_spread():
    candidate = [0.5, *([0.98, 1.0, 1.02] * 10), 2.0]
    ratio = compare_pairs([1.0] * 32, candidate)
    assert (ratio.low, ratio.high) == (0.5, 2.0)
    assert 0.98 <= ratio.ci_low <= ratio.median == 1.0 <= ratio.ci_high <= 1.02
    assert not ratio.excludes_one
    assert ratio.has_enough_pairs


def test_one_pair_says_nothing():
    ratio = compare_pairs([1.0], [2.0])
    assert (ratio.median, ratio.ci_low, ratio.ci_high) == (2.0, 2.0, 2.0)
    assert not ratio.excludes_one


@settings(deadline=None)  # the first call imports numpy
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=12), st.integers(0, 99))
def test_interval_lies_within_the_spread_and_repeats(pairs, seed):
    one, two = zip(*pairs, strict=True)
    ratio = compare_pairs(one, two, num_resamples=200, seed=seed)
    assert ratio == compare_pairs(one, two, num_resamples=200, seed=seed)
    slack = 1 + 1e-9
    assert ratio.low <= ratio.ci_low * slack
    assert ratio.ci_low <= ratio.ci_high
    assert ratio.ci_high <= ratio.high * slack
    assert ratio.median == statistics.median(b / a for a, b in pairs)


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ([], [], "0 and 0 measurements"),
        ([1.0], [1.0, 2.0], "1 and 2 measurements"),
        ([0.0], [1.0], "must be above 0"),
        ([1.0], [-1.0], "must be above 0"),
        ([1.0], [math.nan], "must be above 0"),
        ([1.0], [math.inf], "must be above 0 and finite"),
    ],
)
def test_what_has_no_ratio_is_refused(one, two, message):
    with pytest.raises(ConfigError, match=message):
        compare_pairs(one, two)


def test_variants_take_turns():
    calls = []

    def variant(name):
        def call():
            calls.append(name)
            return f"{name}{calls.count(name)}"

        return call

    results = interleave([variant("a"), variant("b")], 4)
    assert results == [["a1", "a2", "a3", "a4"], ["b1", "b2", "b3", "b4"]]
    order = "".join(calls)
    assert all(order[i : i + 4] in ("abba", "baab") for i in (0, 4))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_every_variant_runs_once_per_round(num_variants, rounds, seed):
    orders = interleaved_order(num_variants, rounds, seed=seed)
    assert orders == interleaved_order(num_variants, rounds, seed=seed)
    assert [sorted(order) for order in orders] == [list(range(num_variants))] * rounds
    for one, two in zip(orders[::2], orders[1::2], strict=False):
        assert one == two[::-1]


def test_either_variant_may_start():
    assert {interleaved_order(2, 1, seed=seed)[0][0] for seed in range(20)} == {0, 1}
    with pytest.raises(ConfigError, match="0 variants"):
        interleave([], 3)
    with pytest.raises(ConfigError, match="0 rounds"):
        interleave([list], 0)


def test_results_are_compared_metric_by_metric():
    one = result(
        *({"p50_ttft_ms": 10.0 + i, "output_tokens_per_s": 5.0, "num_x": 1.0} for i in range(3))
    )
    two = result(
        *(
            {"p50_ttft_ms": 20.0 + 2 * i, "output_tokens_per_s": 10.0, "num_x": 2.0}
            for i in range(3)
        )
    )
    ttft, rate, count = compare_results(one, two)
    assert (ttft.metric, ttft.baseline, ttft.candidate) == ("p50_ttft_ms", 11.0, 22.0)
    assert ttft.ratio.ratios == (2.0, 2.0, 2.0)
    assert (ttft.better, ttft.verdict) == ("lower", "worse")
    assert (rate.better, rate.verdict) == ("higher", "better")
    assert (count.better, count.verdict) == (None, "different")
    assert [row.verdict for row in compare_results(two, one)] == ["better", "worse", "different"]
    assert [row.verdict for row in compare_results(one, one)] == ["unclear"] * 3


def test_figures_without_a_ratio_are_shown_all_the_same():
    one = result({"num_failed": 0, "p99_ttft_ms": None, "only_here": 1.0, "x_s": 1.0})
    two = result({"num_failed": 2, "p99_ttft_ms": 3.0, "x_s": 1.0, "only_there": 1.0})
    rows = compare_results(one, two)
    assert [(row.metric, row.baseline, row.candidate) for row in rows] == [
        ("num_failed", 0, 2),
        ("p99_ttft_ms", None, 3.0),
        ("x_s", 1.0, 1.0),
    ]
    assert [row.ratio is None for row in rows] == [True, True, False]
    assert rows[0].verdict == "unclear"


def test_results_that_are_no_pairs_are_refused():
    with pytest.raises(ConfigError, match="1 runs and 2 runs can't be paired"):
        compare_results(result({"a": 1.0}), result({"a": 1.0}, {"a": 1.0}))
    with pytest.raises(ConfigError, match="can't compare 'serve' with 'latency'"):
        compare_results(result({"a": 1.0}), result({"a": 1.0}, kind="latency"))


def test_better_direction():
    names = ["output_tokens_per_s", "p99_itl_ms", "total_s", "num_failed", "peak_rss_bytes"]
    assert [better_direction(name) for name in names] == ["higher", "lower", "lower", None, "lower"]


def test_what_else_differs_is_found():
    one = result({}, config={"rate": 1, "seed": 0}, environment={"cpu": "x", "time": "1"})
    two = result({}, config={"rate": 2, "seed": 0, "new": 1}, environment={"cpu": "y", "time": "2"})
    assert find_differences(one, two) == {
        "environment.cpu": ("x", "y"),
        "config.rate": (1, 2),
        "config.new": (None, 1),
    }
    assert find_differences(one, one) == {}


def test_metrics_are_the_medians_of_the_runs():
    found = result({"a": 1.0, "b": None}, {"a": 5.0, "b": 2.0}, {"a": 2.0, "c": None})
    assert found.metrics == {"a": 2.0, "b": 2.0, "c": None}
    assert result({"a": 1.0}, metrics={"best": 3.0}).metrics == {"best": 3.0}
    assert result().metrics == {}


def test_a_result_describes_the_machine_by_itself():
    found = BenchmarkResult(kind="serve", config={}, runs=())
    assert {"command", "cpu", "build"} <= found.environment.keys()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
metrics = st.dictionaries(
    st.text(max_size=5), st.none() | st.floats(allow_nan=False, allow_infinity=False), max_size=3
)
results = st.builds(
    BenchmarkResult,
    kind=st.text(),
    config=objects,
    runs=st.lists(st.builds(BenchmarkRun, metrics, objects), max_size=2),
    model=objects,
    environment=objects,
    metrics=metrics,
)


@settings(deadline=None)  # writes files
@given(results)
def test_a_saved_result_is_read_back_as_it_was(tmp_path_factory, drawn):
    file = tmp_path_factory.getbasetemp() / "result.json"
    drawn.save(file)
    assert BenchmarkResult.load(file) == drawn


def test_values_that_json_does_not_know(tmp_path):
    file = tmp_path / "result.json"
    run = {"a": math.nan, "b": math.inf, "c": 1.0}
    result(run, config={"rate": math.inf, "x": (math.nan, -math.inf)}).save(file)
    text = file.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    read = BenchmarkResult.load(file)
    assert read.metrics == read.runs[0].metrics == {"a": None, "b": None, "c": 1.0}
    assert read.config == {"rate": "inf", "x": [None, "-inf"]}
    with pytest.raises(ConfigError, match="does not fit into JSON"):
        result(config={"path": Path("x")}).save(tmp_path / "other.json")
    assert list(tmp_path.iterdir()) == [file]


def saved(tmp_path, **changes):
    file = tmp_path / "result.json"
    values = {**result({"a": 1.0}).to_dict(), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not the result of a benchmark"),
        ({"format": ...}, "not the result of a benchmark"),
        ({"schema_version": 2}, "has schema version 2, and this batchcore reads 1"),
        ({"schema_version": ...}, "has schema version None"),
        ({"kind": 3}, "kind is missing or not of type str"),
        ({"config": ...}, "config is missing"),
        ({"environment": []}, "environment is missing or not of type dict"),
        ({"runs": {}}, "runs is missing or not of type list"),
        ({"runs": [3]}, "runs: each must be an object"),
        ({"runs": [{"metrics": {}}]}, "details is missing"),
        ({"runs": [{"metrics": {"a": "1"}, "details": {}}]}, "metrics: a is not a number"),
        ({"metrics": {"a": True}}, "metrics: a is not a number"),
    ],
)
def test_files_of_another_shape_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=rf"result.json: {message}"):
        BenchmarkResult.load(saved(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_files_that_are_no_json_are_refused(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"result.json is not JSON"):
        BenchmarkResult.load(file)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*missing.json: No such file"):
        BenchmarkResult.load(tmp_path / "missing.json")
    file = tmp_path / "result.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="not the result of a benchmark"):
        BenchmarkResult.load(file)


def test_writing_replaces_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    file.write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*result.json'") as caught:
            write_text_atomically(file, "after")
    assert not isinstance(caught.value, ConfigError)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
    write_text_atomically(file, "after")
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_paths_that_can_not_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")
    for path in (tmp_path / "missing" / "x", file / "x", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"can't write .*"):
            write_text_atomically(path, "after")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "before"


def test_links_and_devices_stay_what_they_are(tmp_path):
    target = tmp_path / "target"
    target.write_text("before")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text_atomically(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text_atomically(pipe, "after")
        assert os.read(reader, 100) == b"after"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
