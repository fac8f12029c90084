"""Showing a run to a person while it goes on: live in a terminal, as lines in a log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rich.cells import cell_len
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from rich.console import Console, RenderableType

    from batchcore.bench.runners import OnDelta
    from batchcore.outputs import StreamDelta

__all__ = ["RunView", "make_view", "tail"]

_MAX_STREAMS = 8
_LABEL_CELLS = len("continuous")
# Drawing takes time from the engine's threads, so it is done just often enough to look alive.
_REFRESH_S = 0.15


class RunView(Protocol):
    """Shows one run at a time."""

    def watch(
        self, label: str, num_requests: int, num_tokens: int
    ) -> AbstractContextManager[OnDelta]:
        """Show a run that is to produce `num_tokens`; gives what to call with every delta."""


def make_view(console: Console, *, quiet: bool) -> RunView:
    """Live in a terminal, a line per finished prompt elsewhere, nothing if `quiet`."""
    if quiet:
        return _Silent()
    return _LiveView(console) if console.is_terminal else _Lines(console)


def tail(text: str, num_cells: int) -> str:
    """As much of the end of a text as fits into so many cells of one line.

    What can't be printed, such as line ends or the escapes that a model might produce, becomes a
    space.
    """
    kept: list[str] = []
    for char in reversed(text):
        shown = char if char.isprintable() else " "
        num_cells -= cell_len(shown)
        if num_cells < 0:
            break
        kept.append(shown)
    return "".join(reversed(kept))


@dataclass
class _Run:
    label: str
    num_requests: int
    num_tokens: int
    start: float = field(default_factory=time.perf_counter)
    num_finished: int = 0
    num_produced: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    """What the running requests have produced; those that finished are gone."""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.start

    def add(self, index: int, delta: StreamDelta) -> str | None:
        """Take a delta in; returns the whole text where it was the last one of its request."""
        self.num_produced += len(delta.token_ids)
        self.texts[index] = self.texts.get(index, "") + delta.text
        if delta.finish_reason is None:
            return None
        self.num_finished += 1
        return self.texts.pop(index)


class _Silent:
    @contextmanager
    def watch(self, label: str, num_requests: int, num_tokens: int) -> Iterator[OnDelta]:
        del label, num_requests, num_tokens
        yield lambda _index, _delta: None


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def watch(self, label: str, num_requests: int, num_tokens: int) -> Iterator[OnDelta]:
        run = _Run(label, num_requests, num_tokens)
        digits = len(str(num_requests))

        def on_delta(index: int, delta: StreamDelta) -> None:
            text = run.add(index, delta)
            if text is not None:
                head = (
                    f"{label:{_LABEL_CELLS}}  {run.num_finished:{digits}}/{num_requests}"
                    f"  {run.elapsed_s:6.1f} s  #{index + 1:<{digits}} "
                )
                room = self._console.width - len(head)
                line = Text(head + tail(text[: 2 * room], room))
                self._console.print(line, no_wrap=True, crop=True)

        yield on_delta


class _LiveView:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def watch(self, label: str, num_requests: int, num_tokens: int) -> Iterator[OnDelta]:
        run = _Run(label, num_requests, num_tokens)
        rows: list[int] = []
        last_s = 0.0
        # Without a thread of its own, which would compete with the engine's.
        with Live(self._draw(run, rows), console=self._console, auto_refresh=False) as live:

            def on_delta(index: int, delta: StreamDelta) -> None:
                nonlocal last_s
                run.add(index, delta)
                if run.elapsed_s - last_s >= _REFRESH_S:
                    last_s = run.elapsed_s
                    self._choose(rows, run)
                    live.update(self._draw(run, rows), refresh=True)

            try:
                yield on_delta
            finally:
                live.update(self._draw(run, []), refresh=True)

    def _choose(self, rows: list[int], run: _Run) -> None:
        """Keep a request on its row until it ends, then give the row to one not shown yet."""
        room = max(0, min(_MAX_STREAMS, self._console.height - 4))
        waiting = [index for index in run.texts if index not in rows]
        rows[:] = [
            index if index in run.texts else waiting.pop(0)
            for index in rows[:room]
            if index in run.texts or waiting
        ]
        rows += waiting[: room - len(rows)]

    def _draw(self, run: _Run, rows: list[int]) -> RenderableType:
        digits = len(str(run.num_requests))
        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        head.add_column(width=_LABEL_CELLS, style="bold")
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            run.label,
            ProgressBar(total=max(1, run.num_tokens), completed=run.num_produced),
            f"{run.num_finished:{digits}}/{run.num_requests} prompts"
            f"  {run.num_produced:{len(str(run.num_tokens))}} tokens  {run.elapsed_s:5.1f} s",
        )
        lines: list[RenderableType] = [head]
        for index in rows:
            name = f"{'#' + str(index + 1):>{digits + 3}} "
            text = tail(run.texts[index], self._console.width - len(name) - 1)
            lines.append(Text.assemble((name, "cyan"), (text, "dim"), no_wrap=True))
        return Group(*lines)
