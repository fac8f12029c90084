"""The measuring half of `batchcore lab`: what is measured, how it goes on, and how it fails."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from types import SimpleNamespace

import batchcore as bc
import numpy as np
import pytest
from batchcore import padding
from batchcore.bench import memory, runners, sweep
from batchcore.bench.model_cost import ModelCost
from batchcore.bench.monitor import MonitorResult
from batchcore.bench.peaks import Peaks
from batchcore.cli import lab as command
from batchcore.cli import make_app
from batchcore.errors import BatchcoreError, ConfigError, EngineError
from batchcore.lab import parts, plan, roofline, run, runs
from batchcore.lab.plan import LabConfig, Rates
from batchcore.lab.setup import Lab, cells_per_seq
from batchcore.lab.store import PartStore, fingerprint
from batchcore.testing import synthetic_gguf
from rich.console import Console
from typer.testing import CliRunner

TINY = dataclasses.replace(
    LabConfig.make(quick=True, n_threads=1),
    repeats=2,
    prompt_tokens=6,
    max_tokens=8,
    short_max_tokens=8,
    batch_sizes=(1, 2, 4),
    sweep_repeats=2,
    varied_tokens=(4, 24),
    padding_prompts=10,
    padding_repeats=1,
    dynamic_prompts=12,
    load_s=0.05,
    min_load_requests=5,
    prefill_tokens=40,
)
PART_FILES = ["batch_sizes", "dynamic", "monitor", "padding", "roofline", "scheduler"]
PART_FILES = sorted([*PART_FILES, "plan", "sequential", "static"])
FINISH = run.finish
ANSWER = {"number": 1, "question": "How?", "answer": "So [1]."}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return synthetic_gguf(tmp_path_factory.mktemp("lab") / "model.gguf")


@pytest.fixture(scope="module")
def model(model_path):
    return bc.Model(model_path)


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch):
    """Peaks take two seconds in a process of their own, and have tests of their own."""
    peaks = Peaks(bytes_per_s=1e10, flops_per_s=1e9, num_threads=1)
    monkeypatch.setattr(roofline, "measure_peaks", lambda _threads: peaks)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(run, "finish", lambda document, _dir: document.update(answers=[ANSWER]))


@pytest.fixture
def lab(model):
    return Lab(model, TINY, ModelCost.from_gguf(model.path))


@pytest.fixture(scope="module")
def document(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "finish", lambda *_: None)
        patch.setattr(roofline, "measure_peaks", lambda _threads: Peaks(1e10, 1e9, 1))
        return run.run_lab(model, tmp_path_factory.mktemp("whole"), TINY)


# -- the document ---------------------------------------------------------------------------------

NUMBER = (int, float)
MAYBE = (int, float, type(None))
RUN = {
    "mode": str,
    "total_s": NUMBER,
    "num_requests": int,
    "num_output_tokens": int,
    "num_prompt_tokens": int,
    "output_tokens_per_s": NUMBER,
    "total_tokens_per_s": NUMBER,
    "latency_s": {"mean": NUMBER, "p50": NUMBER, "p95": NUMBER, "p99": NUMBER},
    "ttft_s": {"mean": NUMBER, "p50": NUMBER, "p95": NUMBER},
}
RATIO = {"median": NUMBER, "low": NUMBER, "high": NUMBER, "values": [NUMBER]}
MONITOR = {"num_samples": int, "summary": dict, "columns": {"time_s": [NUMBER]}}
DOCUMENT = {
    "schema": int,
    "created": str,
    "interrupted": bool,
    "environment": {"cpu": str, "build": dict, "devices": list, "command": str},
    "model": {"sha256": str, "memory_kind": str, "n_vocab": int, "n_layer": int},
    "config": {
        "quick": bool,
        "seed": int,
        "n_threads": int,
        "repeats": int,
        "num_prompts": int,
        "max_tokens": int,
        "batch_sizes": [int],
        "max_num_seqs": int,
        "command": str,
    },
    "parts": {
        "sequential": {"runs": [RUN], "single_s": NUMBER, "median": RUN},
        "static": {
            "runs": [RUN],
            "batch_size": int,
            "median": RUN,
            "speedup": RATIO,
            "parallel_ideal": int,
        },
        "batch_sizes": {
            "rows": [
                {
                    "batch_size": int,
                    "fits": bool,
                    "total_s": MAYBE,
                    "output_tokens_per_s": MAYBE,
                    "total_tokens_per_s": MAYBE,
                    "mean_latency_s": MAYBE,
                    "p95_latency_s": MAYBE,
                    "memory_bytes": MAYBE,
                    "kv_bytes": int,
                    "note": str,
                }
            ],
            "recommended": {"batch_size": int, "reason": str, "rule": str},
        },
        "padding": {
            "lengths": [int],
            "max_tokens": int,
            "batch_size": int,
            "lab_formula_waste_pct": NUMBER,
            "prompt_strategies": [{"strategy": str, "waste_pct": NUMBER, "padded_tokens": int}],
            "slot": [
                {
                    "strategy": str,
                    "formula": {
                        "slot_steps": int,
                        "busy_slot_steps": int,
                        "idle_slot_steps": int,
                        "waste": NUMBER,
                    },
                    "counted": {"busy_slot_steps": int, "idle_slot_steps": int, "waste": NUMBER},
                    "agree": bool,
                    "total_s": NUMBER,
                    "output_tokens_per_s": NUMBER,
                }
            ],
            "continuous": {
                "attention_waste": NUMBER,
                "shape_waste": NUMBER,
                "num_rows": int,
                "num_filler_rows": int,
                "output_tokens_per_s": NUMBER,
            },
        },
        "dynamic": {
            "static": RUN,
            "continuous": RUN,
            "runs": {"static": [RUN], "continuous": [RUN]},
            "improvement": {"throughput": RATIO, "mean_latency": RATIO, "p95_latency": RATIO},
            "utilisation": {"static": dict, "continuous": dict},
            "slot_waste": {"static": NUMBER, "continuous": NUMBER},
        },
        "scheduler": {
            "loads": [
                {
                    "request_rate": NUMBER,
                    "capacity_fraction": NUMBER,
                    "summary": {"p95_ttft_ms": NUMBER, "num_completed": int, "total_s": NUMBER},
                    "num_refused": int,
                }
            ],
            "capacity_requests_per_s": NUMBER,
            "note": str,
        },
    },
    "monitor": {"static": MONITOR, "continuous": MONITOR},
    "roofline": {
        "peaks": {"bytes_per_s": NUMBER, "flops_per_s": NUMBER, "ridge_flops_per_byte": NUMBER},
        "model_cost": {"layer_bytes": int},
        "points": [{"label": str, "rows": int, "verdict": str, "seconds_per_step": NUMBER}],
        "verdict": str,
    },
}


def misfits(value, shape, path="document"):
    """Where a value differs from a shape: a type, a list of a shape, or shapes by key."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        missing = [f"{path}.{key} is missing" for key in shape.keys() - value.keys()]
        there = shape.keys() & value.keys()
        return missing + [m for k in there for m in misfits(value[k], shape[k], f"{path}.{k}")]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{path} is no list, or empty"]
        return [m for i, one in enumerate(value) for m in misfits(one, shape[0], f"{path}[{i}]")]
    is_fine = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return [] if is_fine else [f"{path} is {value!r}"]


def test_document_has_everything_and_is_json(document):
    assert misfits(document, DOCUMENT) == []
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_checker_finds_what_is_wrong():
    assert misfits({"a": [1, "x"]}, {"a": [int], "b": str}) == [
        "document.b is missing",
        "document.a[1] is 'x'",
    ]
    assert misfits(True, int) == ["document is True"]
    assert misfits([], [int]) == ["document is no list, or empty"]


def test_baseline_is_the_same_work_both_ways(document):
    sequential, static = document["parts"]["sequential"], document["parts"]["static"]
    for part in (sequential, static):
        assert len(part["runs"]) == TINY.repeats
        assert part["median"] in part["runs"]
        for one in part["runs"]:
            assert (one["num_requests"], one["num_output_tokens"]) == (8, 8 * TINY.max_tokens)
            assert one["num_prompt_tokens"] == 8 * TINY.prompt_tokens
            assert len(one["latencies_s"]) == len(one["ttfts_s"]) == 8
            assert "requests" not in one
    assert sequential["runs"][0]["mode"] == "sequential"
    assert sequential["single_s"] > 0
    expected = [
        two["output_tokens_per_s"] / one["output_tokens_per_s"]
        for one, two in zip(sequential["runs"], static["runs"], strict=True)
    ]
    assert static["speedup"]["values"] == pytest.approx(expected)
    assert static["speedup"]["low"] == pytest.approx(min(expected))
    assert static["parallel_ideal"] == static["batch_size"] == 8
    assert sequential["utilisation"]["slot_use"] <= 1


def test_batch_sizes_have_a_row_each(document):
    rows = document["parts"]["batch_sizes"]["rows"]
    assert [row["batch_size"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["fits"]
        assert len(row["runs"]) == TINY.sweep_repeats
        assert row["output_tokens_per_s"] == pytest.approx(row["batch_size"] * 8 / row["total_s"])
        # Two layers of two heads of 16, keys and values in f16, one quantum of cells each.
        assert row["kv_bytes"] == row["batch_size"] * 256 * 2 * 2 * (2 * 16) * 2
        assert row["memory_bytes"] > row["kv_bytes"]
        assert row["note"] == ""
    assert document["parts"]["batch_sizes"]["recommended"] == sweep.recommend(rows)


def test_counted_slots_are_those_of_the_formula(document):
    part = document["parts"]["padding"]
    assert [row["strategy"] for row in part["slot"]] == [
        "none",
        "sorted",
        "optimal",
        "sorted by output",
    ]
    for row in part["slot"]:
        assert row["agree"] is True
        assert row["counted"]["busy_slot_steps"] == sum(part["output_lengths"])
        for name, value in row["counted"].items():
            assert value == row["formula"][name]
    assert part["slot"][0]["counted"]["idle_slot_steps"] > 0
    assert part["slot"][3]["counted"]["waste"] < part["slot"][0]["counted"]["waste"]
    none = padding.static_batches(part["lengths"], part["output_lengths"], part["batch_size"])
    assert part["slot"][0]["formula"]["idle_slot_steps"] == none.idle_slot_steps
    expected = padding.calculate_padding_waste(part["lengths"], part["max_tokens"])
    assert part["lab_formula_waste_pct"] == expected


def test_a_count_that_differs_is_said(lab):
    report = padding.static_batches([3, 4], [2, 5], 2)
    counted = {"total_s": 1.0, "busy_slot_steps": 7, "idle_slot_steps": 4, "waste": 4 / 11}
    from batchcore.lab.padding_part import _slot_row

    assert _slot_row(report, [counted])["agree"] is False
    assert _slot_row(report, [{**counted, "idle_slot_steps": 3}])["agree"] is True


def test_dynamic_compares_the_same_requests(document):
    part = document["parts"]["dynamic"]
    outputs = runners.spread_max_tokens(TINY.max_tokens, TINY.dynamic_prompts)
    for mode in ("static", "continuous"):
        assert {one["mode"] for one in part["runs"][mode]} == {mode}
        assert {one["num_output_tokens"] for one in part["runs"][mode]} == {sum(outputs)}
        assert 0 <= part["slot_waste"][mode] < 1
        columns = document["monitor"][mode]["columns"]
        assert len({len(values) for values in columns.values()}) == 1
    expected = [
        two["latency_s"]["p95"] / one["latency_s"]["p95"]
        for one, two in zip(part["runs"]["static"], part["runs"]["continuous"], strict=True)
    ]
    assert part["improvement"]["p95_latency"]["values"] == pytest.approx(expected)


def test_load_is_around_the_capacity_of_part_5(document):
    part, continuous = document["parts"]["scheduler"], document["parts"]["dynamic"]["continuous"]
    capacity = continuous["num_requests"] / continuous["total_s"]
    assert part["capacity_requests_per_s"] == pytest.approx(capacity)
    for load, fraction in zip(part["loads"], (0.5, 0.8, 1.1), strict=True):
        assert load["capacity_fraction"] == fraction
        assert load["request_rate"] == pytest.approx(fraction * capacity)
        assert load["summary"]["num_completed"] == load["num_requests"] >= 5
        assert (load["num_refused"], load["errors"]) == (0, {})
    assert "deadlines, tiers and fair share are not in this version" in part["note"]


def test_roofline_has_a_point_per_size_and_a_prefill(document):
    points = document["roofline"]["points"]
    assert [point["rows"] for point in points] == [1, 2, 4, TINY.prefill_tokens]
    assert [point["outputs"] for point in points] == [1, 2, 4, 1]
    assert [point["label"] for point in points][::3] == ["decode, 1 row", "prefill, 40 rows"]
    # The higher of what numpy and the prefill reached, so that nothing is above its peak.
    assert points[-1]["compute_fraction"] <= 1 + 1e-9


def test_answers_are_in_the_document_before_it_is_written(document, tmp_path, monkeypatch):
    from batchcore.lab import answers, recommendations, report

    written = []
    monkeypatch.setattr(answers, "build_answers", lambda found: [len(found["parts"])])
    monkeypatch.setattr(recommendations, "build_recommendations", lambda _found: [{"title": "a"}])
    monkeypatch.setattr(report, "write_report", lambda *args: written.append(args))
    copy = dict(document)
    FINISH(copy, tmp_path)
    assert (copy["answers"], copy["recommendations"]) == ([6], [{"title": "a"}])
    assert written == [(copy, tmp_path)]


def test_all_questions_are_answered_from_what_is_measured(document):
    from batchcore.lab.answers import build_answers

    found = build_answers(document)
    assert [answer["number"] for answer in found if answer["answered"]] == [*range(1, 13)]


# -- going on where it was ------------------------------------------------------------------------


@pytest.fixture
def interrupted(model, tmp_path):
    """A run that was ended by Ctrl-C in part 4."""

    def ends(*_args, **_options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "static_batches", ends)
        with pytest.raises(KeyboardInterrupt):
            run.run_lab(model, tmp_path, TINY)
    return tmp_path


def saved(folder):
    return sorted(file.stem for file in (folder / "parts").iterdir())


def test_goes_on_where_it_was_interrupted(model, interrupted):
    done = ["batch_sizes", "plan", "sequential", "static"]
    assert saved(interrupted) == done
    before = {name: (interrupted / f"parts/{name}.json").read_bytes() for name in done}
    events = []
    document = run.run_lab(model, interrupted, TINY, events.append)
    assert misfits(document, DOCUMENT) == []
    assert document["config"]["reused_parts"] == ["sequential", "static", "batch_sizes"]
    assert saved(interrupted) == PART_FILES
    for name, content in before.items():
        assert (interrupted / f"parts/{name}.json").read_bytes() == content
        if name != "plan":
            assert document["parts"][name] == json.loads(content)["content"]
    assert [event.stage for event in events if event.note == "found"] == [1, 2]
    again = run.run_lab(model, interrupted, TINY)
    assert again["parts"] == document["parts"]
    assert again["roofline"] == document["roofline"]


@pytest.mark.parametrize("damage", ["", "{}", '{"format": "batchcore-lab-part", "content": {}}'])
def test_damaged_parts_are_measured_again(model, interrupted, damage):
    (interrupted / "parts/static.json").write_text(damage, "utf-8")
    document = run.run_lab(model, interrupted, TINY)
    assert document["config"]["reused_parts"] == ["batch_sizes"]
    assert misfits(document, DOCUMENT) == []


def test_other_sizes_and_restarts_reuse_nothing(model, interrupted):
    other = dataclasses.replace(TINY, seed=1)
    assert run.run_lab(model, interrupted, other)["config"]["reused_parts"] == []
    assert run.run_lab(model, interrupted, other, restart=True)["config"]["reused_parts"] == []


def test_another_model_reuses_nothing(interrupted, tmp_path):
    other = bc.Model(synthetic_gguf(tmp_path / "other.gguf", seed=1))
    assert run.run_lab(other, interrupted, TINY)["config"]["reused_parts"] == []


def test_an_interrupted_run_is_not_taken_for_a_whole_one():
    assert runs.complete(runners.RunResult("static", 1)).num_requests == 1
    with pytest.raises(KeyboardInterrupt):
        runs.complete(runners.RunResult("static", 1, interrupted=True))


def test_fingerprints_differ_where_values_do():
    assert fingerprint(a=1, b=[math.nan]) == fingerprint(b=(math.nan,), a=1)
    assert fingerprint(a=1) != fingerprint(a=2)


# -- memory ---------------------------------------------------------------------------------------


def test_sizes_without_memory_are_rows_too(lab, monkeypatch):
    kv = {size: memory.kv_bytes(lab.model, lab.cost, size, 256) for size in (2, 4)}
    enough = memory.needed_bytes(lab.model, kv[2], 2)
    monkeypatch.setattr(memory, "free_bytes", lambda: enough)
    part = parts.measure_batch_sizes(lab, {})["batch_sizes"]
    assert [row["fits"] for row in part["rows"]] == [True, True, False]
    last = part["rows"][2]
    assert last["note"].startswith("needs 0.0")
    assert last["kv_bytes"] == kv[4]
    assert last["total_s"] is last["output_tokens_per_s"] is last["memory_bytes"] is None
    assert part["recommended"]["batch_size"] in {1, 2}
    found = roofline.measure_roofline(lab, {"batch_sizes": part})["roofline"]
    assert [point["rows"] for point in found["points"]] == [1, 2, 40]


def test_an_engine_without_memory_is_a_row_too(lab, monkeypatch):
    make = Lab.engine

    def engine(self, max_num_seqs, longest, **options):
        if max_num_seqs == 2:
            raise EngineError("failed to allocate the KV cache.")
        return make(self, max_num_seqs, longest, **options)

    monkeypatch.setattr(Lab, "engine", engine)
    rows = parts.measure_batch_sizes(lab, {})["batch_sizes"]["rows"]
    assert [row["fits"] for row in rows] == [True, False, True]
    assert rows[1]["note"] == "failed to allocate the KV cache"


def test_nothing_fits(lab, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    part = parts.measure_batch_sizes(lab, {})["batch_sizes"]
    assert part["recommended"]["batch_size"] is None
    assert not any(row["fits"] for row in part["rows"])


def test_memory_of_a_model_by_its_shapes(lab):
    by_cost = memory.kv_bytes(lab.model, lab.cost, 3, 512)
    assert by_cost == memory.kv_bytes(lab.model, None, 3, 512)
    assert memory.needed_bytes(lab.model, by_cost, 3) > by_cost
    assert memory.why_not(5, None) is memory.why_not(5, 5) is None
    assert memory.why_not(6_000_000_000, 5) == (
        "needs 6.00 GB on top of the model, and 0.00 GB are free"
    )
    assert [cells_per_seq(tokens) for tokens in (1, 256, 257)] == [256, 256, 512]


def test_what_is_free_is_less_than_all(monkeypatch):
    import psutil

    assert 0 < memory.free_bytes() < psutil.virtual_memory().total
    assert memory.used_bytes() > 1 << 20
    monkeypatch.setattr(memory, "_group_limits", lambda: [(1 << 20, 1 << 20)])
    assert memory.free_bytes() == 0
    gpu = {"type": "gpu", "memory_total_bytes": 1000, "memory_free_bytes": 700}
    monkeypatch.setattr(memory._core, "devices", lambda: [{"type": "cpu"}, gpu])
    assert memory.free_bytes() == 650
    assert memory.used_bytes() > 300


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current")),
        ("4:memory:/a/b", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_limits_of_control_groups(tmp_path, line, folder, names):
    listing = tmp_path / "cgroup"
    listing.write_text(f"8:pids:/\n{line}\n", "utf-8")
    group = tmp_path / "root" / folder
    (group / "b").mkdir(parents=True)
    for name, value in zip(names, ("1000", "600"), strict=True):
        (group / name).write_text(f"{value}\n", "utf-8")
    (group / "memory.stat").write_text("anon 300\nactive_file 150\ninactive_file 50\n", "utf-8")
    (group / "b" / names[0]).write_text("max\n", "utf-8")
    assert memory._group_limits(listing, tmp_path / "root") == [(1000, 400)]
    assert memory._group_limits(tmp_path / "none", tmp_path) == []


# -- the plan -------------------------------------------------------------------------------------


def test_fast_models_get_all_of_it():
    for quick in (True, False):
        config = LabConfig.make(quick=quick, n_threads=2)
        assert plan.fit_to_budget(config, Rates(5000, 500, 5000)) == config


def test_slow_models_get_less_and_never_nothing():
    config = LabConfig.make(quick=True, n_threads=2)
    some = plan.fit_to_budget(config, Rates(100, 30, 60))
    assert 0.1 < some.scale < 1
    assert plan.estimate_s(some, Rates(100, 30, 60)) <= config.time_budget_s
    assert some.max_tokens < config.max_tokens
    least = plan.fit_to_budget(config, Rates(4, 1, 1))
    assert (least.repeats, least.sweep_repeats, least.batch_sizes) == (1, 1, (1, 2, 4, 8))
    assert (least.max_tokens, least.short_max_tokens, least.prompt_tokens) == (8, 8, 8)
    assert least.num_prompts == 8
    # A model that writes a token per second is done within the hour.
    assert plan.estimate_s(least, Rates(4, 1, 1)) < 3600


def test_no_sequence_is_longer_than_the_model_was_trained_for():
    config = plan.fit_to_context(LabConfig.make(quick=False, n_threads=1), 64)
    assert config.prompt_tokens + config.max_tokens <= 64
    assert config.varied_tokens[1] + config.max_tokens <= 64
    assert config.prefill_tokens < 64
    with pytest.raises(ConfigError, match="more than 3 tokens"):
        plan.fit_to_context(config, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (2, 1)},
        {"batch_sizes": (0, 1)},
        {"repeats": 0},
        {"seed": -1},
        {"varied_tokens": (9, 8)},
    ],
)
def test_sizes_that_cannot_work(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(TINY, **change)


def test_a_slow_model_is_not_tried_batched(lab, monkeypatch):
    from batchcore.lab import calibrate

    monkeypatch.setattr(calibrate, "_SLOW_S", 0.0)
    rates = calibrate.measure_rates(lab)
    assert rates.batched_tokens_per_s == rates.decode_tokens_per_s > 0


# -- figures --------------------------------------------------------------------------------------


def size_row(size, rate, p95):
    return {"batch_size": size, "fits": True, "output_tokens_per_s": rate, "p95_latency_s": p95}


def test_recommended_is_the_knee():
    rows = [size_row(1, 50.0, 1.0), size_row(2, 95.0, 1.1), size_row(4, 100.0, 2.2)]
    found = sweep.recommend(rows)
    assert found["batch_size"] == 2
    assert found["reason"] == (
        "2 reach 95.0 output tokens/s, 95% of the best, 100.0 with 4; with 4 a request takes 2.0 "
        "times as long (p95)"
    )
    assert found["rule"] == "the smallest batch size with at least 95% of the best throughput"
    assert sweep.recommend(rows[:2])["reason"].endswith(
        "and no other size comes near it with fewer"
    )


def test_the_median_run_is_a_real_one():
    rounds = [{"total_s": total_s} for total_s in (3.0, 1.0, 2.0, 4.0)]
    assert runs.median_run(rounds[:3]) is rounds[2]
    assert runs.median_run(rounds) is rounds[2]


def test_json_has_no_nan():
    assert runs.without_nan({"a": (math.nan, 1.5), 2: [math.inf]}) == {
        "a": [None, 1.5],
        "2": [None],
    }


def test_samples_are_thinned():
    columns = {"time_s": np.arange(1001.0), "num_running": np.ones(1001)}
    monitor = MonitorResult(columns, 0.0, 0.1, [], {}, {}, {})
    found = runs.Watched({}, monitor, None, None).thinned_monitor()
    assert found["columns"]["time_s"][:2] == [0, 3]
    assert len(found["columns"]["time_s"]) <= 400
    assert found["every_nth_sample"] == 3


def test_the_verdict_names_each_range():
    decode = [SimpleNamespace(rows=n, verdict="memory-bound") for n in (1, 2)]
    decode.append(SimpleNamespace(rows=4, verdict="compute-bound"))
    assert roofline.say_verdict(decode, SimpleNamespace(rows=64, verdict="compute-bound")) == (
        "decode with 1 to 2 rows is memory-bound; decode with 4 rows is compute-bound; "
        "a prefill of 64 tokens is compute-bound"
    )


def test_a_roofline_that_cannot_be_known_says_why(lab, monkeypatch):
    rows = {"batch_sizes": {"rows": []}}
    no_cost = Lab(lab.model, TINY, None, "of no known shape")
    found = roofline.measure_roofline(no_cost, rows)["roofline"]
    assert (found["points"], found["verdict"]) == ([], "not known: of no known shape")

    def fails(_threads):
        raise BatchcoreError("no numpy")

    monkeypatch.setattr(roofline, "measure_peaks", fails)
    found = roofline.measure_roofline(lab, rows)["roofline"]
    assert (found["peaks"], found["verdict"]) == (None, "not known: no numpy")
    monkeypatch.setattr(roofline._core, "devices", lambda: [{"type": "gpu"}])
    found = roofline.measure_roofline(lab, rows)["roofline"]
    assert "GPU" in found["verdict"]


def test_prompts_are_as_long_as_asked_for(lab):
    assert {len(prompt) for prompt in lab.prompts(5, 7)} == {7}
    low, high = TINY.varied_tokens
    assert all(low <= len(prompt) <= high for prompt in lab.varied_prompts(20))
    assert lab.varied_prompts(4) == lab.varied_prompts(4) != lab.varied_prompts(4, seed_offset=1)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def invoke(model_path, monkeypatch):
    monkeypatch.setattr(LabConfig, "make", lambda **_options: TINY)

    def invoke(*args):
        result = CliRunner().invoke(make_app(), ["lab", *args], env={"COLUMNS": "120"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return lambda *args: invoke(str(model_path), *args)


def test_command_prints_answers_and_goes_on(invoke, interrupted):
    out = ("--out", str(interrupted))
    first = invoke(*out)
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert "1 and 2: one by one, static batch (done before)" in lines
    assert "4: padding" in lines
    assert any(line.startswith("All parts take about") for line in lines)
    assert lines[-4:] == [" 1. How?", "    So [1].", "", f"Report: {interrupted / 'index.html'}"]
    assert invoke(*out).stdout.count("(done before)") == len(run.STAGES)
    assert "(done before)" not in invoke(*out, "--restart").stdout


def test_ctrl_c_says_how_to_go_on(invoke, tmp_path, monkeypatch):
    def ends(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(padding, "static_batches", ends)
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 130
    assert f"Finished parts are kept in {tmp_path / 'parts'}" in result.stderr
    assert result.stderr.endswith("interrupted\n")


def test_bars_in_a_terminal():
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file, command._shown(console) as on_progress:
        for done, note in ((0.0, "none"), (1.0, "done")):
            on_progress(run.LabProgress(3, 6, "4: padding", done, note, 90.0))
        on_progress(run.LabProgress(4, 6, "5: both", 1.0, "found", 90.0))
        assert "4: padding" in console.export_text(clear=False)
        assert console.export_text().count("about 2 minutes") == 1


def test_bad_input_ends_before_anything_is_measured(tmp_path, monkeypatch, invoke):
    def measures(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr(run, "run_lab", measures)
    result = CliRunner().invoke(make_app(), ["lab", "nothing.gguf", "--out", str(tmp_path / "a")])
    assert (result.exit_code, result.stderr) == (2, "error: no such file: nothing.gguf\n")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUFnot")
    result = CliRunner().invoke(make_app(), ["lab", str(broken), "--out", str(tmp_path / "a")])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: '{broken}' can't be loaded")
    monkeypatch.setattr("batchcore.model.Model", measures)
    result = invoke("--out", str(broken / "report"))
    assert result.exit_code == 2
    assert result.stderr == f"error: can't write {broken / 'report'}: Not a directory\n"
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "psutil" else name)
    result = invoke("--out", str(tmp_path / "b"))
    assert result.exit_code == 2
    assert result.stderr == "error: the lab needs psutil: pip install 'batchcore[lab]'\n"
    assert not (tmp_path / "b").exists()


def test_a_full_disk_leaves_nothing_half_written(invoke, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = invoke("--out", str(tmp_path))
        assert (result.exit_code, saved(tmp_path)) == (1, [])
        assert "No space left on device" in result.stderr

    store = PartStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save({"static": {"a": 1}}, "mark")
    assert saved(tmp_path) == []


def test_a_part_that_fails_keeps_those_before(model, tmp_path, monkeypatch):
    def fails(*_args, **_options):
        raise EngineError("the device is gone")

    monkeypatch.setattr(padding, "static_batches", fails)
    with pytest.raises(EngineError, match="device is gone"):
        run.run_lab(model, tmp_path, TINY)
    assert saved(tmp_path) == ["batch_sizes", "plan", "sequential", "static"]


def test_a_model_that_cannot_generate(tmp_path):
    encoder = bc.Model(synthetic_gguf(tmp_path / "bert.gguf", "bert"))
    with pytest.raises(ConfigError):
        run.run_lab(encoder, tmp_path / "out", TINY)
