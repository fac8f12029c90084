"""`batchcore demo`: three modes over the same work, and what is said about them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import batchcore as bc
import pytest
from batchcore import _core, prompts
from batchcore.bench import runners
from batchcore.cli import make_app
from batchcore.cli.run_view import make_view, tail
from batchcore.errors import ModelDownloadError
from batchcore.models.presets import find_preset
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

MODES = ["sequential", "static", "continuous"]
# One thread: several would wait for each other where the machine has other things to do too.
SMALL = ("--num-prompts", "4", "--max-tokens", "8", "--concurrency", "2", "--n-threads", "1")


@pytest.fixture
def run(smollm2, monkeypatch):
    """Run the command on a model that is loaded already."""
    monkeypatch.setattr("batchcore.model.Model", lambda name, **_: smollm2)

    def invoke(*args):
        result = CliRunner().invoke(make_app(), ["demo", *SMALL, *args], env={"COLUMNS": "80"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture(scope="module")
def whole(smollm2_path, tmp_path_factory):
    """The command as a person would run it: its output, and its JSON."""
    file = tmp_path_factory.mktemp("demo") / "out.json"
    command = [sys.executable, "-m", "batchcore", "demo", *SMALL, "--json", str(file)]
    done = subprocess.run(
        [*command, "--model", "smollm2-135m"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout, json.loads(file.read_text("utf-8"))


def test_json_says_what_was_measured_and_where(whole):
    _, report = whole
    assert set(report) == {"environment", "model", "settings", "runs"}
    environment = report["environment"]
    assert environment["build"] == _core.build_info()
    assert environment["command"].endswith("--model smollm2-135m")
    assert environment["num_usable_cores"] >= 1
    assert environment["cpu"]
    assert report["model"]["sha256"] == find_preset("smollm2-135m").sha256
    settings = report["settings"]
    assert settings["max_tokens"] == runners.spread_max_tokens(8, 4)
    assert (settings["num_prompts"], settings["concurrency"], settings["n_threads"]) == (4, 2, 1)
    assert [one["mode"] for one in report["runs"]] == MODES


def test_json_counts_what_was_produced(whole, smollm2):
    _, report = whole
    texts = prompts.load()[:4]
    for one in report["runs"]:
        assert one["num_requests"] == one["num_finished"] == len(one["requests"]) == 4
        assert [request["index"] for request in one["requests"]] == [0, 1, 2, 3]
        for request, text, count in zip(
            one["requests"], texts, report["settings"]["max_tokens"], strict=True
        ):
            (completion,) = request["completions"]
            assert request["num_output_tokens"] == len(completion["token_ids"]) == count
            assert request["num_prompt_tokens"] == len(smollm2.tokenize_prompt(text))
            assert completion["finish_reason"] == "length"
            assert 0 < request["ttft_s"] <= request["latency_s"] <= one["total_s"]
        assert one["num_output_tokens"] == sum(report["settings"]["max_tokens"])
        expected = one["num_output_tokens"] / one["total_s"]
        assert one["output_tokens_per_s"] == pytest.approx(expected)
        assert one["speedup"] == pytest.approx(report["runs"][0]["total_s"] / one["total_s"])


def test_modes_give_the_same_outputs(whole):
    _, report = whole
    firsts = [
        [request["completions"][0]["token_ids"][0] for request in one["requests"]]
        for one in report["runs"]
    ]
    # Later tokens may part where two are equally likely up to rounding.
    assert firsts[0] == firsts[1] == firsts[2]
    assert report["runs"][0]["num_outputs_equal_to_sequential"] == 4


def test_lines_and_a_table_where_there_is_no_terminal(whole):
    out, report = whole
    lines = out.splitlines()
    assert "4 prompts of 5 to" in lines[0]
    for one in report["runs"]:
        ends = [line for line in lines if line.startswith(f"{one['mode']:10}  ")]
        assert [line.split()[1] for line in ends] == ["1/4", "2/4", "3/4", "4/4"]
        row = next(line.split() for line in lines if line.startswith(f" {one['mode']} "))
        assert row[1:5] == [
            f"{one['total_s']:.2f}",
            "s",
            str(one["num_output_tokens"]),
            f"{one['output_tokens_per_s']:.1f}",
        ]
        assert row[-1] == f"{one['speedup']:.2f}x"
    assert max(map(cell_len, lines)) <= 80
    assert "\x1b" not in out


def test_quiet_prints_only_the_table(run):
    result = run("--quiet", "--num-prompts", "1", "--max-tokens", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "#1" not in result.stdout
    assert "speed-up" in result.stdout


def test_prompts_start_over_when_more_are_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "load", lambda: ["One", "Two and"])
    file = tmp_path / "out.json"
    result = run("--num-prompts", "3", "--max-tokens", "1", "--json", str(file), "-q")
    assert result.exit_code == 0
    report = json.loads(file.read_text("utf-8"))
    lengths = [request["num_prompt_tokens"] for request in report["runs"][2]["requests"]]
    assert lengths[0] == lengths[2] != lengths[1]
    assert "output tokens (1)" in " ".join(result.stdout.split())


def test_ctrl_c_shows_what_is_done(run, monkeypatch, tmp_path):
    def interrupted(engine, texts, params, *, batch_size, on_delta):
        result = runners.run_sequential(engine, texts[:1], params[:1])
        result.mode, result.num_requests, result.interrupted = "static", 4, True
        return result

    monkeypatch.setattr(runners, "run_static", interrupted)
    result = run("--json", str(tmp_path / "out.json"))
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert "Interrupted: static is not complete (1 of 4 prompts" in result.stdout
    assert "continuous" not in result.stdout.partition("mode")[2].partition("Latency:")[0]
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [(one["mode"], one["speedup"]) for one in report["runs"]] == [
        ("sequential", 1.0),
        ("static", None),
    ]


def test_falls_back_when_the_default_model_cannot_be_pulled(smollm2, monkeypatch):
    asked = []

    def load(name, **_):
        asked.append(name)
        if name == "gemma3-270m":
            raise ModelDownloadError("could not download gemma", model=name)
        return smollm2

    monkeypatch.setattr("batchcore.model.Model", load)
    args = ["demo", *SMALL, "--num-prompts", "1", "--max-tokens", "1", "-q"]
    result = CliRunner().invoke(make_app(), args)
    assert result.exit_code == 0
    assert asked == ["gemma3-270m", "smollm2-135m"]
    assert result.stderr.startswith("could not download gemma\nUsing smollm2-135m instead")
    # Whoever names a model gets that one or an error.
    result = CliRunner().invoke(make_app(), [*args, "-m", "gemma3-270m"])
    assert (result.exit_code, result.stderr) == (1, "error: could not download gemma\n")


def test_bad_json_file_is_told_before_anything_runs(run, tmp_path):
    for file in (tmp_path, tmp_path / "none" / "x.json"):
        result = run("--json", str(file))
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: can't write {file}")


# -- the live view --------------------------------------------------------------------------------


def delta(text, finish_reason=None):
    return bc.StreamDelta(1, 0, text, [5], None, finish_reason, None)


@pytest.mark.parametrize(
    ("text", "cells", "expected"),
    [
        ("abcdef", 4, "cdef"),
        ("ab", 4, "ab"),
        ("", 4, ""),
        ("one\ntwo", 7, "one two"),
        ("a\x1b[31mb", 20, "a [31mb"),
        ("日本語", 5, "本語"),
        ("x日", 1, ""),
    ],
)
def test_tail_fits_and_is_safe_to_print(text, cells, expected):
    assert tail(text, cells) == expected
    assert cell_len(expected) <= cells


@pytest.mark.parametrize("width", [40, 80, 120])
def test_live_view_fits_the_terminal(width, monkeypatch):
    monkeypatch.setattr("batchcore.cli.run_view._REFRESH_S", 0.0)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=10, color_system=None
    )
    view = make_view(console, quiet=False)
    with view.watch("continuous", 20, 400) as on_delta:
        for step in range(5):
            for index in range(20):
                on_delta(index, delta("wörd 語\n" * 5, "length" if step == 4 else None))
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", console.file.getvalue())
    assert "20/20 prompts" in shown
    assert "#6" in shown
    assert max(cell_len(line) for line in re.split(r"[\r\n]", shown)) <= width


def test_live_view_keeps_a_stream_on_its_row(monkeypatch):
    monkeypatch.setattr("batchcore.cli.run_view._REFRESH_S", 0.0)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=7, color_system=None
    )
    view = make_view(console, quiet=False)

    def rows_after(index, text, finish_reason=None):
        console.file.truncate(0)
        on_delta(index, delta(text, finish_reason))
        lines = console.file.getvalue().split("\n")
        return [line.split()[-1] for line in lines if "#" in line]

    with view.watch("continuous", 5, 50) as on_delta:
        assert rows_after(0, "a") == ["a"]
        assert rows_after(1, "b") == ["a", "b"]
        assert rows_after(2, "c") == ["a", "b", "c"]
        assert rows_after(3, "d") == ["a", "b", "c"]  # no room
        assert rows_after(1, "!", "stop") == ["a", "d", "c"]
        assert rows_after(0, "!", "stop") == ["d", "c"]
