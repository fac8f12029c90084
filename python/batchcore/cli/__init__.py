"""The `batchcore` command: one module of this folder per command, or per group of commands."""

from __future__ import annotations

import typer


def make_app() -> typer.Typer:
    """Put the commands together. Each module is one line here: a function, or a `typer.Typer`."""
    from batchcore.cli import bench, demo, generate, info, lab, models, tune  # noqa: PLC0415

    app = typer.Typer(
        name="batchcore",
        help="Batch many LLM requests over llama.cpp, in process.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)  # keeps sub-commands even while there is only one
    app.command()(demo.demo)
    app.command()(generate.generate)
    app.command()(info.info)
    app.command()(lab.lab)
    app.command()(tune.tune)
    app.add_typer(bench.app, name="bench")
    app.add_typer(models.app, name="models")
    return app


def main() -> None:
    """Run the command line."""
    make_app()()
