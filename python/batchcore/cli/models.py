"""`batchcore models`: list the presets, pull one, print where one is."""

from __future__ import annotations

from typing import Annotated

import typer

from batchcore import models
from batchcore.cli.errors import reported

app = typer.Typer(help="List and pull models.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="Name of a preset.", show_default=False)]


@app.command("list")
@reported()
def list_() -> None:
    """Show the presets, and which of them are in the cache."""
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("name", "size", "licence", "pulled", "description", box=box.SIMPLE_HEAD)
    for preset in models.list_presets():
        pulled = "yes" if models.path(preset.name) else "no"
        size = f"{preset.size_bytes / 1e6:.0f} MB"
        table.add_row(preset.name, size, preset.licence, pulled, preset.description)
    console = Console()
    console.print(table)
    console.print(f"cache: {models.cache_dir()}", soft_wrap=True, highlight=False)


@app.command()
@reported()
def pull(
    name: _Name = models.DEFAULT_PRESET,
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the SHA-256 of a model already pulled.")
    ] = False,
) -> None:
    """Download a preset into the cache, and print its path."""
    typer.echo(models.pull(name, progress=not quiet, verify=verify))


@app.command()
@reported()
def path(name: _Name = models.DEFAULT_PRESET) -> None:
    """Print where a preset is in the cache; exit status 1 if it has not been pulled."""
    found = models.path(name)
    if found is None:
        typer.echo(f"{name} has not been pulled: batchcore models pull {name}", err=True)
        raise typer.Exit(1)
    typer.echo(found)
