"""`batchcore lab`: six measurements on a model and this machine, and a report of them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchcore.cli.errors import reported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from batchcore.lab.run import LabProgress

__all__ = ["lab"]


@reported()
def lab(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Path, preset or hf:owner/repo/file.gguf.")
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the report.")
    ] = Path("lab-report"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer tokens: about three minutes, not twenty.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths and arrivals.")] = 0,
    n_threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="CPU threads.", show_default="one per usable core"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Measure also what was measured before.")
    ] = False,
) -> None:
    """Measure batching on a model and this machine, and write a report with all answers.

    A run that was stopped goes on where it was when the same command is given again.
    """
    from rich.console import Console  # noqa: PLC0415

    from batchcore.engine_options import usable_cores  # noqa: PLC0415
    from batchcore.lab.plan import LabConfig  # noqa: PLC0415
    from batchcore.lab.run import check_extras, run_lab  # noqa: PLC0415
    from batchcore.lab.store import PartStore  # noqa: PLC0415
    from batchcore.model import Model  # noqa: PLC0415

    # Both before the model, which may have to be pulled first.
    check_extras()
    PartStore(out)
    console = Console(highlight=False)
    loaded = Model(model, progress=True)
    config = LabConfig.make(quick=quick, seed=seed, n_threads=n_threads or usable_cores())
    console.print(f"{loaded.description}, {_count(config.n_threads, 'thread')}", soft_wrap=True)
    try:
        with _shown(console) as on_progress:
            document = run_lab(loaded, out, config, on_progress, restart=restart)
    except KeyboardInterrupt:
        typer.echo(f"Finished parts are kept in {out / 'parts'}: run it again to go on.", err=True)
        raise
    _print_answers(console, document)
    console.print(f"\nReport: {out / 'index.html'}", soft_wrap=True)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[LabProgress], None]]:
    """What to call with the progress: a bar per part in a terminal, a line elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    started: dict[int, Any] = {}
    has_estimate = False

    def head(progress: LabProgress) -> str:
        nonlocal has_estimate
        if progress.estimated_s is not None and not has_estimate:
            has_estimate = True
            minutes = max(1, round(progress.estimated_s / 60))
            console.print(f"All parts take about {_count(minutes, 'minute')}.")
        return progress.title if progress.note != "found" else f"{progress.title} (done before)"

    if not console.is_terminal:

        def print_line(progress: LabProgress) -> None:
            text = head(progress)
            if progress.stage not in started:
                started[progress.stage] = text
                console.print(text, soft_wrap=True)

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    # Drawn between runs only: a thread that draws would compete with the engine's.
    with Progress(*columns, console=console, auto_refresh=False) as bars:

        def draw(progress: LabProgress) -> None:
            text = head(progress)
            if progress.stage not in started:
                started[progress.stage] = bars.add_task(text, total=1.0, note="")
            bars.update(
                started[progress.stage],
                description=text,
                completed=progress.done,
                note="" if progress.done >= 1 else progress.note,
            )
            bars.refresh()

        yield draw


def _print_answers(console: Console, document: dict[str, Any]) -> None:
    console.print()
    for answer in document["answers"]:
        console.print(
            f"{answer['number']:2}. {answer['question']}\n    {answer['answer']}", markup=False
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
