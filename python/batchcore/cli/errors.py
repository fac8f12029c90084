"""How commands fail: one line on stderr and an exit status, no traceback."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from batchcore.errors import (
    BatchcoreError,
    ConfigError,
    InvalidRequestError,
    ModelDownloadError,
    ModelLoadError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["one_line", "reported"]

_FAILED = 1
_MISUSED = 2
_INTERRUPTED = 130  # as shells report SIGINT
_PIPE_CLOSED = 141  # and SIGPIPE


@contextmanager
def reported() -> Iterator[None]:
    """Decorates a command: turns errors into a line and an exit status.

    2 where the command, its parameters, a file or the model named can't work; 1 where something
    failed that might work another time; 130 after Ctrl-C; 141 where who reads the output has gone.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(_PIPE_CLOSED) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except BatchcoreError as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(_status_of(error)) from None
    except OSError as error:  # a full disk, say; behind RequestTimeoutError, which is one too
        typer.echo(f"error: {error}", err=True)
        _drop_stdout()
        raise typer.Exit(_FAILED) from None


def one_line(error: BatchcoreError) -> str:
    """The message of an error without line ends."""
    return " ".join(str(error).split())


def _drop_stdout() -> None:
    """The interpreter flushes stdout once more at its exit, which must not fail again."""
    with suppress(OSError, ValueError):  # not a real file, e.g. in tests
        stdout = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)


def _status_of(error: BatchcoreError) -> int:
    if isinstance(error, ModelDownloadError):
        return _FAILED
    misuse = (ConfigError, InvalidRequestError, ModelLoadError)
    return _MISUSED if isinstance(error, misuse) else _FAILED
