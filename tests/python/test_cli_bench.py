"""`batchcore bench` and `batchcore tune`, and the profile that comes of the latter."""

from __future__ import annotations

import json

import batchcore as bc
import pytest
from batchcore.bench.result import BenchmarkResult
from batchcore.bench.tune import Trial, _winner, tune
from batchcore.bench.workload import Workload
from batchcore.cli import make_app
from batchcore.errors import ConfigError
from batchcore.testing import synthetic_gguf
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return synthetic_gguf(tmp_path_factory.mktemp("bench") / "model.gguf", n_layer=1, n_embd=64)


@pytest.fixture
def run(model_path):
    def invoke(*args):
        result = CliRunner().invoke(
            make_app(), [*args[:-1], str(model_path), *args[-1]], env={"COLUMNS": "120"}
        )
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


def test_latency(run, tmp_path):
    saved = ("--save-result", "--result-dir", str(tmp_path))
    options = ("--input-len", "8", "--output-len", "6", "--batch-size", "3", "--num-iters", "2")
    result = run("bench", "latency", [*options, *saved])
    assert result.exit_code == 0, result.output
    for name in ("batch_latency_s", "mean_ttft_ms", "mean_tpot_ms", "output_tokens_per_s"):
        assert name in result.stdout
    (file,) = tmp_path.glob("latency-*.json")
    loaded = BenchmarkResult.load(file)
    assert len(loaded.runs) == 2
    assert loaded.config["batch_size"] == loaded.config["max_num_seqs"] == 3
    assert loaded.model["file_name"] == "model.gguf"


SMALL_LOAD = ("--num-prompts", "6", "--prompt-tokens", "uniform:3:9", "--output-tokens", "fixed:4")


def test_throughput_counts_what_was_produced(run, tmp_path):
    saved = ("--save-result", "--result-dir", str(tmp_path), "--num-runs", "2")
    result = run("bench", "throughput", [*SMALL_LOAD, "--goodput", "ttft:60000", *saved])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("throughput-*.json")
    loaded = BenchmarkResult.load(file)
    assert loaded.metrics["num_output_tokens"] == 24
    assert loaded.metrics["num_completed"] == 6
    assert loaded.metrics["goodput_requests_per_s"] > 0
    assert len(loaded.runs) == 2
    compared = CliRunner().invoke(make_app(), ["bench", "compare", str(file), str(file)])
    assert compared.exit_code == 0, compared.output
    assert "fewer than 6 runs" in compared.stdout


def test_only_the_percentiles_asked_for_are_shown(run):
    options = [*SMALL_LOAD, "--percentile-metrics", "ttft", "--request-rate", "500"]
    result = run("bench", "throughput", options)
    assert result.exit_code == 0, result.output
    assert "p99_ttft_ms" in result.stdout
    assert "itl_ms" not in result.stdout


def test_a_trace_replaces_made_up_requests(run, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 3}] * 4
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    result = run("bench", "throughput", ["--trace", str(trace)])
    assert result.exit_code == 0, result.output
    trace.write_text("{}\n", "utf-8")
    result = run("bench", "throughput", ["--trace", str(trace)])
    assert result.exit_code != 0
    assert "line 1" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--percentile-metrics", "speed"], "'speed'"),
        (["--prompt-tokens", "many"], "many"),
        (["--goodput", "ttft"], "ttft"),
        (["--profile", "/nowhere/profile.json"], "can't read the profile"),
    ],
)
def test_bad_options_are_named(run, options, message):
    result = run("bench", "throughput", [*SMALL_LOAD, *options])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_sweep_goes_on_past_a_size_that_does_not_fit(run, tmp_path, monkeypatch):
    def why_not(needed, free):
        return "too large" if needed > smallest_that_fails else None

    from batchcore.bench import memory

    smallest_that_fails = 9e9
    options = ["--batch-sizes", "1,2,4", "--input-len", "6", "--output-len", "4"]
    result = run("bench", "sweep", options)
    assert result.exit_code == 0, result.output
    assert "recommended: " in result.stdout
    monkeypatch.setattr(memory, "needed_bytes", lambda model, kv, size: 1e9 if size < 4 else 1e10)
    monkeypatch.setattr(memory, "why_not", why_not)
    saved = ("--save-result", "--result-dir", str(tmp_path))
    result = run("bench", "sweep", [*options, *saved])
    assert result.exit_code == 0, result.output
    assert "too large" in result.stdout
    (file,) = tmp_path.glob("sweep-*.json")
    details = BenchmarkResult.load(file).runs[0].details
    assert [row["fits"] for row in details["rows"]] == [True, True, False]
    assert details["recommended"]["batch_size"] in (1, 2)
    missed = run("bench", "sweep", [*options, "--latency-target", "1e-9"])
    assert "no batch size meets the latency target" in missed.stdout
    assert run("bench", "sweep", ["--batch-sizes", "one"]).exit_code != 0


def test_results_of_different_benchmarks_are_not_compared(tmp_path):
    for kind in ("latency", "throughput"):
        BenchmarkResult(kind, {}, ()).save(tmp_path / f"{kind}.json")
    files = [str(tmp_path / "latency.json"), str(tmp_path / "throughput.json")]
    result = CliRunner().invoke(make_app(), ["bench", "compare", *files])
    assert result.exit_code != 0
    assert "can't compare" in result.output


def test_tune_writes_a_profile_that_an_engine_loads(run, tmp_path, model_path):
    out = tmp_path / "profile.json"
    options = ["--num-prompts", "4", "--prompt-tokens", "fixed:5", "--output-tokens", "fixed:3"]
    options += ["--rounds", "1", "--n-ctx", "1024", "--n-threads", "1", "--n-ubatch", "64,128"]
    options += ["--max-num-seqs", "4,2", "--out", str(out)]
    result = run("tune", options)
    assert result.exit_code == 0, result.output
    profile = bc.Profile.load(out)
    assert profile.options["n_threads"] == 1
    assert profile.options["n_ubatch"] in (64, 128)
    assert profile.evidence["model"]["file_name"] == "model.gguf"
    assert len(profile.evidence["trials"]) == 1 + 2 + 2 + 2 + 2
    with bc.Engine(model_path, n_ctx=1024, profile=out) as engine:
        assert engine.max_num_seqs == profile.options["max_num_seqs"]
        assert engine.kv_layout == profile.options["kv_layout"]
        assert engine.n_threads == 1
    with bc.Engine(model_path, n_ctx=1024, profile=profile, max_num_seqs=3) as engine:
        assert engine.max_num_seqs == 3


def test_a_value_that_does_not_work_is_a_note_and_no_winner(model_path):
    seen = []
    model = bc.Model(model_path)
    workload = Workload.generate(model, num_prompts=2, prompt_tokens=4, output_tokens=2)
    result = tune(
        model,
        candidates={"flash_attn": ["sideways", "auto"], "max_num_seqs": [2]},
        workload=workload,
        n_ctx=512,
        rounds=1,
        on_trial=seen.append,
    )
    assert result.profile.options == {"flash_attn": "auto", "max_num_seqs": 2}
    assert seen[0].total_tokens_per_s is None
    assert "sideways" in seen[0].note
    with pytest.raises(ConfigError, match="no value of flash_attn works"):
        tune(model, candidates={"flash_attn": ["x"]}, workload=workload, n_ctx=512, rounds=1)
    with pytest.raises(ConfigError, match="can't set 'speed'"):
        tune(model, candidates={"speed": [1]}, workload=workload, n_ctx=512, rounds=1)


def test_a_winner_is_clearly_faster_than_what_comes_first():
    trials = [Trial("n_ubatch", 512, 100.0), Trial("n_ubatch", 128, 102.0)]
    assert _winner("n_ubatch", trials) == 512
    assert _winner("n_ubatch", [*trials, Trial("n_ubatch", 64, 110.0)]) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no profile"),
        ("{", "is not JSON"),
        ('{"format": "batchcore-profile", "schema_version": 9}', "version 9"),
        ('{"format": "batchcore-profile", "schema_version": 1}', "has no options"),
        (
            '{"format": "batchcore-profile", "schema_version": 1, "options": {"n_ctx": 1}}',
            "can't set 'n_ctx'",
        ),
        (
            '{"format": "batchcore-profile", "schema_version": 1, "options": {"n_ubatch": "1"}}',
            "type int",
        ),
    ],
)
def test_bad_profiles_are_refused(tmp_path, text, message):
    file = tmp_path / "profile.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        bc.Profile.load(file)
