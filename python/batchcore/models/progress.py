"""Showing a pull to a person: a progress bar, and the notices that come with a model."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchcore.models.presets import Preset

__all__ = ["Reporter", "reporter", "show"]


class Reporter(Protocol):
    """What a pull tells about its progress."""

    def phase(self, text: str, total_bytes: int) -> None:
        """Start a phase of a known size."""

    def update(self, done_bytes: int) -> None:
        """Set how much of the phase is done."""


class _Silent:
    def phase(self, text: str, total_bytes: int) -> None:
        pass

    def update(self, done_bytes: int) -> None:
        pass


class _Bar:
    def __init__(self) -> None:
        # rich is only needed here, and importing it takes longer than everything else together.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self.progress.add_task("", total=None)

    def phase(self, text: str, total_bytes: int) -> None:
        self.progress.reset(self._task, description=text, total=total_bytes)

    def update(self, done_bytes: int) -> None:
        self.progress.update(self._task, completed=done_bytes)


@contextmanager
def reporter(*, progress: bool) -> Iterator[Reporter]:
    """A progress bar on stderr for the block, or nothing at all."""
    if not progress:
        yield _Silent()
        return
    bar = _Bar()
    with bar.progress:
        yield bar


def show(preset: Preset, folder: str) -> None:
    """Print the notice of a model on stderr, and where its terms are kept.

    Printed with and without a progress bar, since whoever pulls a model has to see its terms.
    """
    if not preset.notice:
        return
    files = ", ".join(member.file_name for member in preset.notice_files)
    print(
        f"{preset.name}: {preset.notice}\nThe terms are kept in {folder}: {files}", file=sys.stderr
    )
