"""`batchcore generate`: complete many prompts, batched, to text or JSONL."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections import deque
from contextlib import ExitStack
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from batchcore.cli.errors import one_line, reported
from batchcore.cli.prompt_file import InputFormat, PromptItem, read_prompts
from batchcore.errors import BatchcoreError, ConfigError, InvalidRequestError
from batchcore.models import DEFAULT_PRESET
from batchcore.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchcore.engine import Engine
    from batchcore.handle import RequestHandle
    from batchcore.model import Model
    from batchcore.outputs import RequestOutput

    Writer = Callable[[PromptItem, RequestOutput | BatchcoreError], None]

__all__ = ["generate"]

# Requests handed to the engine ahead of the one whose output is next: far more than run at a time,
# far fewer than the queue may hold.
_WINDOW = 1024
_DEFAULTS = SamplingParams()


@reported()
def generate(
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Path, preset or hf:…")
    ] = DEFAULT_PRESET,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="One prompt per line, or JSONL; - is stdin."
        ),
    ] = None,
    input_format: Annotated[
        InputFormat, typer.Option(help="Of the file; auto: JSONL if it starts with {.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Output tokens per completion, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token.")
    ] = _DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="0 means all.")] = _DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option()] = _DEFAULTS.top_p,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same output.", show_default="random")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Completions per prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are messages: apply the chat template.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Completions that run at the same time.")] = 16,
    n_ctx: Annotated[int, typer.Option(help="KV cells, shared by all that run.")] = 8192,
    n_threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one per usable core")
    ] = None,
    num_speculative_tokens: Annotated[
        int,
        typer.Option(help="Tokens to guess per completion and step, at most, from what repeats."),
    ] = 0,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Write JSONL to stdout.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSONL here.")
    ] = None,
    progress: Annotated[bool, typer.Option("--progress", help="Show bars on stderr.")] = False,
) -> None:
    """Complete prompts, batched, and write outputs in the order of the prompts.

    A line of a JSONL file is {"prompt": text or tokens, "id": ..., any of SamplingParams}.
    """
    values = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or (),
        "n": n,
    }
    items = _items(prompt, file, values, input_format)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    from batchcore.engine import Engine  # noqa: PLC0415
    from batchcore.model import Model  # noqa: PLC0415

    with ExitStack() as stack:
        if output is not None:
            write = _jsonl_writer(stack.enter_context(_open(output)))
        elif jsonl:
            write = _jsonl_writer(sys.stdout)
        else:
            write = _text_writer(sys.stdout, len(items))
        loaded = Model(model, progress=progress)
        engine = stack.enter_context(
            Engine(
                loaded,
                max_num_seqs=concurrency,
                n_ctx=n_ctx,
                n_threads=n_threads,
                num_speculative_tokens=num_speculative_tokens,
            )
        )
        if chat:
            items = [_as_chat(loaded, item) for item in items]
        to_person = output is None and not jsonl and sys.stdout.isatty()
        if to_person and len(items) == 1 and n == 1:
            _stream(engine, items[0])
        elif _run(engine, items, write, progress=progress) > 0:
            raise typer.Exit(1)


def _items(
    prompts: list[str] | None,
    file: str | None,
    values: dict[str, Any],
    input_format: InputFormat,
) -> list[PromptItem]:
    if bool(prompts) == (file is not None):
        raise ConfigError("give either prompts (-p) or a file of them (-f)")
    params = SamplingParams(**values)  # checked here: a bad option is no fault of the file
    if file is not None:
        return read_prompts(file, values, input_format=input_format)
    return [
        PromptItem(index, text, params, f"prompt {index + 1}")
        for index, text in enumerate(prompts or ())
    ]


def _as_chat(model: Model, item: PromptItem) -> PromptItem:
    if not isinstance(item.prompt, str):
        raise InvalidRequestError(f"{item.where}: --chat needs texts, not tokens")
    message = {"role": "user", "content": item.prompt}
    return dataclasses.replace(item, chat_tokens=model.tokenize_chat([message]))


def _open(file: Path) -> IO[str]:
    try:
        return file.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"can't write {file}: {error.strerror}") from error


def _run(engine: Engine, items: list[PromptItem], write: Writer, *, progress: bool) -> int:
    """Keep the engine busy, write outputs in order; returns how many requests failed."""
    waiting = iter(items)
    started: deque[tuple[PromptItem, RequestHandle | BatchcoreError]] = deque()
    failed = 0
    for item in _tracked(items, progress=progress):
        while len(started) < _WINDOW and (following := next(waiting, None)) is not None:
            started.append((following, _submit(engine, following)))
        outcome = _wait_for(started.popleft()[1])
        if isinstance(outcome, BatchcoreError):
            failed += 1
            typer.echo(f"error: {item.where}: {one_line(outcome)}", err=True)
        write(item, outcome)
    return failed


def _submit(engine: Engine, item: PromptItem) -> RequestHandle | BatchcoreError:
    # One prompt that can't be served, e.g. because it is too long, must not stop the others.
    try:
        return engine.submit(item.input, item.params)
    except InvalidRequestError as error:
        return error


def _wait_for(started: RequestHandle | BatchcoreError) -> RequestOutput | BatchcoreError:
    if isinstance(started, BatchcoreError):
        return started
    try:
        return started.result()
    except BatchcoreError as error:
        return error


def _tracked(items: list[PromptItem], *, progress: bool) -> Iterator[PromptItem]:
    if not progress:
        yield from items
        return
    # rich is only needed here, and importing it takes long.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    yield from track(items, description="generating", console=Console(stderr=True))


def _stream(engine: Engine, item: PromptItem) -> None:
    """For a person who waits for one answer: write it as it comes."""
    for delta in engine.stream(item.input, item.params):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _text_writer(stream: IO[str], num_prompts: int) -> Writer:
    """Texts under a line that names the prompt; one completion alone stands without."""
    number = 0

    def write(item: PromptItem, outcome: RequestOutput | BatchcoreError) -> None:
        nonlocal number
        number += 1
        completions = [] if isinstance(outcome, BatchcoreError) else outcome.outputs
        for completion in completions:
            if num_prompts > 1 or len(completions) > 1:
                which = f" #{completion.index + 1}" if len(completions) > 1 else ""
                stream.write(f"=== {number}/{num_prompts}{which}: {_heading(item.prompt)}\n")
            stream.write(f"{completion.text}\n")
        stream.flush()

    return write


def _heading(prompt: str | list[int], length: int = 60) -> str:
    text = " ".join(prompt.split()) if isinstance(prompt, str) else str(prompt)
    return text if len(text) <= length else text[: length - 1] + "…"


def _jsonl_writer(stream: IO[str]) -> Writer:
    def write(item: PromptItem, outcome: RequestOutput | BatchcoreError) -> None:
        for row in _rows(item, outcome):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()

    return write


def _rows(item: PromptItem, outcome: RequestOutput | BatchcoreError) -> Iterator[dict[str, Any]]:
    """One per completion; one with `error` where there is none."""
    head = {"id": item.id, "prompt": item.prompt}
    if isinstance(outcome, BatchcoreError):
        yield {**head, "error": str(outcome)}
        return
    metrics = dataclasses.asdict(outcome.metrics) if outcome.metrics else None
    for completion in outcome.outputs:
        yield {
            **head,
            "index": completion.index,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "num_prompt_tokens": len(outcome.prompt_token_ids),
            "num_cached_tokens": outcome.num_cached_tokens,
            "num_output_tokens": len(completion.token_ids),
            "metrics": metrics,
        }
