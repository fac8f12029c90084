"""`batchcore generate`: inputs, outputs, and every way to get it wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import batchcore as bc
import pytest
from batchcore.cli import generate as generate_module
from batchcore.cli import make_app
from batchcore.cli.errors import reported
from batchcore.cli.prompt_file import read_prompts
from batchcore.errors import ConfigError, InvalidRequestError
from typer.testing import CliRunner

FOX, SKY = "The quick brown fox", "The sky is"


@pytest.fixture
def run(smollm2, monkeypatch):
    """Run the command on a model that is loaded already."""
    monkeypatch.setattr("batchcore.model.Model", lambda name, **_: smollm2)

    def invoke(*args, stdin=None):
        result = CliRunner().invoke(make_app(), ["generate", *ONE_THREAD, *args], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


GREEDY = ("--temperature", "0", "--max-tokens", "4", "--n-ctx", "1024")
# Several would wait for each other where the machine has other things to do too.
ONE_THREAD = ("--n-threads", "1")


def test_one_prompt_gives_its_text_only(run, smollm2):
    result = run("-p", SKY, *GREEDY)
    with bc.Engine(smollm2, n_ctx=1024, n_threads=1) as engine:
        expected = engine.generate(SKY, bc.SamplingParams(max_tokens=4, temperature=0))[0].text
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_several_prompts_are_told_apart(run):
    result = run("-p", SKY, "-p", "Line\nbreak " + "x" * 80, *GREEDY)
    heads = [line for line in result.stdout.splitlines() if line.startswith("===")]
    assert heads == [f"=== 1/2: {SKY}", "=== 2/2: Line break " + "x" * 48 + "…"]


def test_jsonl_has_what_the_engine_said(run):
    result = run("-p", SKY, "-p", FOX, "--jsonl", *GREEDY)
    assert result.exit_code == 0
    first, second = rows(result.stdout)
    assert (first["id"], first["prompt"], second["id"], second["prompt"]) == (0, SKY, 1, FOX)
    assert first["num_output_tokens"] == 4
    assert first["finish_reason"] == "length"
    assert first["num_prompt_tokens"] == 3
    assert 0 <= first["metrics"]["ttft_s"] <= first["metrics"]["latency_s"]


def test_order_is_that_of_the_input_not_of_the_ends(run):
    lines = [
        json.dumps({"prompt": f"Number {index}", "max_tokens": 1 + 7 * (index % 2 == 0)})
        for index in range(8)
    ]
    result = run("-f", "-", "--jsonl", "--concurrency", "3", *GREEDY, stdin="\n".join(lines))
    found = rows(result.stdout)
    assert [row["prompt"] for row in found] == [f"Number {index}" for index in range(8)]
    assert [row["num_output_tokens"] for row in found] == [8, 1] * 4


def test_more_prompts_than_are_handed_over_at_once(run, monkeypatch):
    monkeypatch.setattr(generate_module, "_WINDOW", 2)
    result = run("-f", "-", "--jsonl", *GREEDY, stdin="".join(f"{i} and\n" for i in range(7)))
    assert [row["prompt"] for row in rows(result.stdout)] == [f"{i} and" for i in range(7)]


def test_jsonl_input_overrides_options(run, smollm2, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "a", "prompt": SKY, "max_tokens": 2},
        {"prompt": smollm2.tokenize_prompt(SKY), "logit_bias": {"42": 100}, "max_tokens": 3},
        {"id": 7, "prompt": SKY, "stop": [" "], "min_tokens": 1},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    result = run("-f", str(file), "--jsonl", *GREEDY)
    a, biased, stopped = rows(result.stdout)
    assert (a["id"], a["num_output_tokens"]) == ("a", 2)
    assert (biased["id"], biased["num_prompt_tokens"]) == (1, 3)
    assert biased["text"] == smollm2.detokenize([42, 42, 42])
    assert (stopped["id"], stopped["finish_reason"]) == (7, "stop")
    assert stopped["stop_reason"] == " "


def test_output_file_and_completions(run, tmp_path):
    file = tmp_path / "out.jsonl"
    result = run(
        "-p",
        SKY,
        "-n",
        "2",
        "--temperature",
        "1",
        "--seed",
        "5",
        "-o",
        str(file),
        "--max-tokens",
        "4",
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert [row["index"] for row in rows(file.read_text("utf-8"))] == [0, 1]


def test_same_seed_same_text(run):
    one, two = (run("-p", SKY, "--seed", "3", "--max-tokens", "8").stdout for _ in range(2))
    assert one == two != run("-p", SKY, "--seed", "4", "--max-tokens", "8").stdout


def test_stop_is_repeatable(run):
    text = run("-p", SKY, *GREEDY).stdout.removesuffix("\n")
    result = run("-p", SKY, "--jsonl", "--stop", "not in there", "--stop", text[5:7], *GREEDY)
    (row,) = rows(result.stdout)
    assert (row["text"], row["stop_reason"]) == (text.partition(text[5:7])[0], text[5:7])


def test_chat_applies_the_template(run, smollm2):
    result = run("-p", "Hi", "--chat", "--jsonl", *GREEDY)
    expected = len(smollm2.tokenize_chat([{"role": "user", "content": "Hi"}]))
    assert rows(result.stdout)[0]["num_prompt_tokens"] == expected > 10


def test_progress_goes_to_stderr(run):
    result = run("-p", SKY, "--jsonl", "--progress", *GREEDY)
    assert len(rows(result.stdout)) == 1
    assert "generating" in result.stderr


def test_a_terminal_sees_the_text_as_it_comes(smollm2, monkeypatch):
    class Terminal(io.StringIO):
        flushes: list[str]

        def isatty(self):
            return True

        def flush(self):
            self.flushes.append(self.getvalue())

    stdout = Terminal()
    stdout.flushes = []
    monkeypatch.setattr("batchcore.model.Model", lambda name, **_: smollm2)
    monkeypatch.setattr(generate_module.sys, "stdout", stdout)
    generate_module.generate(prompt=[SKY], temperature=0.0, max_tokens=5, n_ctx=1024, n_threads=1)
    assert len(set(stdout.flushes)) >= 5
    assert stdout.getvalue().endswith("\n")


def test_one_bad_prompt_does_not_stop_the_others(run):
    result = run("-p", "word " * 2000, "-p", SKY, "--jsonl", *GREEDY)
    assert result.exit_code == 1
    bad, good = rows(result.stdout)
    assert "a sequence of this engine holds" in bad["error"]
    assert good["num_output_tokens"] == 4
    assert result.stderr.startswith("error: prompt 1: the prompt has")


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        ((), None, "either prompts"),
        (("-p", "a", "-f", "b"), None, "either prompts"),
        (("-f", "/no/such/file"), None, "can't read /no/such/file: No such file"),
        (("-f", "-"), "\n \n", "no prompts in stdin"),
        (("-f", "-"), b"ok\n\xff\n", "stdin is not UTF-8 (line 2)"),
        (("-f", "-"), '{"prompt": "a"', "stdin, line 1: no valid JSON"),
        (("-f", "-"), '\n{"prompt": "a"}\n[1]', "stdin, line 3: not a JSON object"),
        (("-f", "-"), '{"text": "a"}', '"prompt" must be'),
        (("-f", "-"), '{"prompt": ["a"]}', '"prompt" must be'),
        (("-f", "-"), '{"prompt": "a", "id": []}', "id must be"),
        (("-f", "-"), '{"prompt": "a", "max_token": 3}', "did you mean 'max_tokens'?"),
        (("-f", "-"), '{"prompt": "a", "top_p": 3}', "line 1: top_p must be"),
        (("-f", "-"), '{"prompt": "a", "temperature": "x"}', "line 1: "),
        (("-f", "-"), '{"prompt": "a", "logit_bias": {"x": 1}}', "line 1: "),
        (("-f", "-", "--chat"), '{"prompt": [1]}', "--chat needs texts"),
        (("-p", "a", "--top-p", "3"), None, "top_p must be"),
        (("-f", "-", "--top-p", "3"), "a", "error: top_p must be"),
        (("-p", "a", "--n-ctx", "0"), None, "n_ctx must be"),
        (("-p", "a", "-o", "/no/such/folder/x"), None, "can't write /no/such/folder/x"),
    ],
)
def test_misuse_is_one_line_and_status_2(run, args, stdin, message):
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_missing_model(tmp_path):
    result = CliRunner().invoke(make_app(), ["generate", "-p", "a", "-m", str(tmp_path / "x.gguf")])
    assert result.exit_code == 2
    assert result.stderr == f"error: no such file: {tmp_path / 'x.gguf'}\n"


def test_reader_that_leaves_is_no_error(smollm2_path):
    command = [sys.executable, "-m", "batchcore", "generate", "-m", str(smollm2_path), "-f", "-"]
    with subprocess.Popen(
        [*command, *ONE_THREAD, "--max-tokens", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        err = process.communicate(b"One\nTwo\n")[1]
    assert (process.returncode, err) == (141, b"")


def test_text_files_may_have_dos_line_ends_and_a_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfOne\r\n\r\n  two \r\n")
    items = read_prompts(str(file), {})
    assert [(item.prompt, item.where) for item in items] == [
        ("One", f"{file}, line 1"),
        ("  two ", f"{file}, line 3"),
    ]


def test_input_format_can_be_said(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "a"}\n')
    assert read_prompts(str(file), {})[0].prompt == "a"
    assert read_prompts(str(file), {}, input_format="text")[0].prompt == '{"prompt": "a"}'
    file.write_text("plain\n")
    with pytest.raises(InvalidRequestError, match="no valid JSON"):
        read_prompts(str(file), {}, input_format="jsonl")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (bc.errors.EngineError("two\nlines"), 1, "error: two lines\n"),
        (bc.errors.RequestTimeoutError("late"), 1, "error: late\n"),
        (bc.errors.ModelDownloadError("no network"), 1, "error: no network\n"),
        (bc.errors.ModelLoadError("no model"), 2, "error: no model\n"),
        (ConfigError("no"), 2, "error: no\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_how_commands_fail(error, status, message):
    import typer

    app = typer.Typer()

    @app.command()
    @reported()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(app)
    assert (result.exit_code, result.stderr) == (status, message)
