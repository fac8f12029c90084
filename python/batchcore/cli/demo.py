"""`batchcore demo`: the same prompts one by one, in static batches, and continuously batched."""

from __future__ import annotations

import itertools
import json
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchcore.cli.errors import reported
from batchcore.errors import ConfigError, ModelDownloadError
from batchcore.models import DEFAULT_PRESET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from batchcore.bench.runners import OnDelta, RunResult
    from batchcore.cli.run_view import RunView
    from batchcore.engine import Engine
    from batchcore.model import Model
    from batchcore.params import SamplingParams

__all__ = ["demo"]

# Its quantisation has kernels that compute several rows at once; that of the default preset has
# none, so that batching gains little there.
_PREFERRED_PRESET = "gemma3-270m"

# llama.cpp rounds the cells of a sequence up to a multiple of this.
_CELL_QUANTUM = 256


@reported()
def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Path or preset.", show_default=_PREFERRED_PRESET, metavar="MODEL"
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="How many; more than there are start over.")
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest output; the shortest has a quarter of it.")
    ] = 48,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Prompts that run at the same time, batched.")
    ] = 16,
    n_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="one per usable core")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all results here.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the table.")] = False,
) -> None:
    """Run real prompts one by one, in static batches, and continuously batched; compare."""
    from rich.console import Console  # noqa: PLC0415

    from batchcore import prompts as bundled  # noqa: PLC0415

    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigError(f"can't write {json_file}: it is a folder, or its folder does not exist")
    console = Console(highlight=False)
    loaded = _load(model, quiet=quiet)
    texts = list(itertools.islice(itertools.cycle(bundled.load()), num_prompts))
    setup = _Setup(loaded, texts, max_tokens, min(concurrency, num_prompts), n_threads)
    if not quiet:
        console.print(setup.summary(), soft_wrap=True)
    results = _run_all(setup, console, quiet=quiet)
    _print_results(console, setup, results)
    if json_file is not None:
        _write_json(json_file, setup, results)
    if any(result.interrupted for result in results):
        raise KeyboardInterrupt


class _Setup:
    """What all three runs have in common."""

    def __init__(
        self,
        model: Model,
        texts: list[str],
        max_tokens: int,
        concurrency: int,
        n_threads: int | None,
    ) -> None:
        from batchcore.bench.runners import spread_max_tokens  # noqa: PLC0415
        from batchcore.params import SamplingParams  # noqa: PLC0415

        self.model = model
        self.prompts = [model.tokenize_prompt(text) for text in texts]
        self.concurrency = concurrency
        self.n_threads = n_threads
        # Of different lengths, since that is where static and continuous batching part; and always
        # the same for a prompt, so that the three runs have the same work.
        self.num_tokens = spread_max_tokens(max_tokens, len(texts))
        self.params: list[SamplingParams] = [
            SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
            for count in self.num_tokens
        ]

    @property
    def n_ctx(self) -> int:
        longest = max(map(len, self.prompts)) + max(self.num_tokens)
        return self.concurrency * (-(-longest // _CELL_QUANTUM) * _CELL_QUANTUM)

    def make_engine(self) -> Engine:
        from batchcore.engine import Engine  # noqa: PLC0415

        # Without the prefix cache, or the second run would find the prompts of the first in it.
        return Engine(
            self.model,
            max_num_seqs=self.concurrency,
            n_ctx=self.n_ctx,
            n_threads=self.n_threads,
            prefix_caching=False,
        )

    def summary(self) -> str:
        lengths = [len(prompt) for prompt in self.prompts]
        return (
            f"{self.model.description}: {_count(len(lengths), 'prompt')} of {_span(lengths)} tokens"
            f", {self.concurrency} at a time"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_prompts": len(self.prompts),
            "max_tokens": self.num_tokens,
            "concurrency": self.concurrency,
            "n_ctx": self.n_ctx,
            "n_threads": self.n_threads,
            "prefix_caching": False,
            "temperature": 0,
            "ignore_eos": True,
        }


def _load(name: str | None, *, quiet: bool) -> Model:
    from batchcore.model import Model  # noqa: PLC0415

    if name is not None:
        return Model(name, progress=not quiet)
    try:
        return Model(_PREFERRED_PRESET, progress=not quiet)
    except ModelDownloadError as error:
        typer.echo(
            f"{error}\nUsing {DEFAULT_PRESET} instead, whose quantisation gains less from batching",
            err=True,
        )
        return Model(DEFAULT_PRESET, progress=not quiet)


def _run_all(setup: _Setup, console: Console, *, quiet: bool) -> list[RunResult]:
    """Run the modes one after another, up to one that was interrupted."""
    from batchcore.bench import runners  # noqa: PLC0415
    from batchcore.cli.run_view import make_view  # noqa: PLC0415

    def static(*args: Any, on_delta: OnDelta) -> RunResult:
        return runners.run_static(*args, batch_size=setup.concurrency, on_delta=on_delta)

    modes: dict[str, Callable[..., RunResult]] = {
        "sequential": runners.run_sequential,
        "static": static,
        "continuous": runners.run_continuous,
    }
    view = make_view(console, quiet=quiet)
    results: list[RunResult] = []
    with setup.make_engine() as engine:
        runners.warm_up(engine, setup.prompts)
        for mode, run in modes.items():
            results.append(_run_one(run, mode, engine, setup, view))
            if results[-1].interrupted:
                break
    return results


def _run_one(
    run: Callable[..., RunResult], mode: str, engine: Engine, setup: _Setup, view: RunView
) -> RunResult:
    with view.watch(mode, len(setup.prompts), sum(setup.num_tokens)) as on_delta:
        return run(engine, setup.prompts, setup.params, on_delta=on_delta)


def _speedup(results: Sequence[RunResult], result: RunResult) -> float | None:
    """Over the sequential run; None where one of the two is not complete."""
    if results[0].interrupted or result.interrupted:
        return None
    return results[0].total_s / result.total_s


def _num_same(results: Sequence[RunResult], result: RunResult) -> int:
    """How many outputs are token for token those of the sequential run."""
    expected = {request.index: request.output for request in results[0].requests}
    return sum(
        request.index in expected
        and request.output.outputs[0].token_ids == expected[request.index].outputs[0].token_ids
        for request in result.requests
    )


def _print_results(console: Console, setup: _Setup, results: Sequence[RunResult]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("mode", style="bold", no_wrap=True)
    for name in (
        "total",
        "output\ntokens",
        "tokens/s",
        "mean\nlatency",
        "p95\nlatency",
        "speed-up",
    ):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for result in results:
        speedup = _speedup(results, result)
        table.add_row(
            result.mode,
            _seconds(result.total_s),
            str(result.num_output_tokens),
            f"{result.output_tokens_per_s:.1f}",
            *map(_seconds, (result.mean_latency_s, result.latency_percentile_s(95))),
            f"{speedup:.2f}x" if speedup else "-",
        )
    console.print(table)
    for line in _notes(setup, results):
        console.print(line)


def _notes(setup: _Setup, results: Sequence[RunResult]) -> Iterator[str]:
    """What a reader has to know to read the table."""
    count = setup.concurrency
    last = results[-1]
    if last.interrupted:
        finished = f"{len(last.requests)} of {_count(last.num_requests, 'prompt')} had finished"
        yield f"Interrupted: {last.mode} is not complete ({finished}), and counts only those."
    yield (
        "Latency: from the start of a run, when all prompts arrive, until the last token of a "
        "prompt is here."
    )
    yield (
        f"Static: {count} prompts at a time; the next {count} start when all of these have ended. "
        f"Continuous: {count} at a time; when one ends, the next takes its slot."
    )
    yield (
        f"Every prompt has its fixed number of output tokens ({_span(setup.num_tokens)}), the same "
        "in each run; greedy, end-of-text tokens ignored, no prefix cache, after a warm-up."
    )
    if not results[1:]:
        return
    if all(_num_same(results, result) == len(result.requests) for result in results[1:]):
        yield "All outputs equal: each mode gave the tokens of the sequential run."
        return
    same = [
        f"{result.mode} {_num_same(results, result)} of {len(result.requests)}"
        for result in results[1:]
    ]
    yield (
        f"Outputs equal to those of the sequential run: {', '.join(same)}. (ggml's kernels round "
        "otherwise for batches of other sizes, which can tip a close choice.)"
    )


def _write_json(file: Path, setup: _Setup, results: Sequence[RunResult]) -> None:
    from batchcore.bench.environment import describe_environment, describe_model  # noqa: PLC0415

    report = {
        "environment": describe_environment(),
        "model": describe_model(setup.model),
        "settings": setup.to_dict(),
        "runs": [
            {
                **result.to_dict(),
                "speedup": _speedup(results, result),
                "num_outputs_equal_to_sequential": _num_same(results, result),
            }
            for result in results
        ],
    }
    try:
        file.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"can't write {file}: {error.strerror}") from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _seconds(value: float) -> str:
    return "-" if value != value else f"{value:.2f} s"  # noqa: PLR0124 (NaN: nothing finished)
