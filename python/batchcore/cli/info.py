"""`batchcore info`: what this build is, and what it can run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator


def info(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print version, llama.cpp commit, CPU features, backends and devices."""
    from batchcore import _core  # noqa: PLC0415

    found = {"build": _core.build_info(), "devices": _core.devices()}
    if as_json:
        import json  # noqa: PLC0415

        typer.echo(json.dumps(found, indent=2))
    else:
        _print_tables(found)


def _build_rows(build: dict[str, Any]) -> Iterator[tuple[str, str]]:
    import platform  # noqa: PLC0415

    yield "batchcore", build["version"]
    yield (
        "llama.cpp",
        f"{build['llama_cpp_commit']} (from llama-cpp-python {build['llama_cpp_version']})",
    )
    yield "backends", ", ".join(build["backends"])
    yield "CPU features", ", ".join(build["cpu_features"]) or "chosen by the compiler"
    yield "CPU kernels", build["kernels"]
    yield "compiler", f"{build['compiler']}, {build['build_type']}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "-"


def _print_tables(found: dict[str, Any]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False)
    build = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    build.add_column(style="bold", no_wrap=True)
    build.add_column()
    for row in _build_rows(found["build"]):
        build.add_row(*row)
    console.print(build)

    devices = Table("device", "type", "backend", "description", box=box.SIMPLE_HEAD)
    devices.add_column("memory", justify="right")
    devices.add_column("free", justify="right")
    for device in found["devices"]:
        devices.add_row(
            device["name"],
            device["type"],
            device["backend"],
            device["description"],
            _gib(device["memory_total_bytes"]),
            _gib(device["memory_free_bytes"]),
        )
    console.print(devices)
