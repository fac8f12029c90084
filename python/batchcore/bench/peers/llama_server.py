"""llama-server, upstream's own HTTP server, in the configurations that its users choose from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.http_server import HttpServer

if TYPE_CHECKING:
    from batchcore.bench.peers.base import Setup
    from batchcore.bench.workload import WorkloadRequest

__all__ = ["VARIANTS", "LlamaServer", "LlamaServerDialect", "find_program", "program_version"]

VARIANTS = {
    "llama-server": ("--no-kv-unified",),
    "llama-server-kvu": ("--kv-unified",),
    "llama-server-bs": ("--no-kv-unified", "--backend-sampling"),
}
"""Flags by the name of the peer."""


def find_program(name: str, folder: Path | None) -> Path | None:
    """A program in a folder, or else on the PATH; None where it is in neither."""
    if folder is not None and (folder / name).is_file():
        return folder / name
    found = shutil.which(name)
    return None if found is None else Path(found)


def program_version(program: Path) -> str:
    """What one of upstream's programs says of its build; empty where it says nothing."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    return next((line.strip() for line in lines if line.startswith("version")), "")


class LlamaServerDialect:
    """The server's own endpoint, which takes tokens and counts those that it gives."""

    path = "/completion"

    def body(self, request: WorkloadRequest) -> dict[str, Any]:
        """The same sampling as batchcore's, by the samplers that it needs and no others."""
        params = request.params
        values: dict[str, Any] = {
            "prompt": request.prompt,
            "n_predict": params.max_tokens,
            "ignore_eos": params.ignore_eos,
            "stream": True,
            "temperature": params.temperature,
            "seed": params.seed or 0,
        }
        if params.temperature == 0:
            return {**values, "samplers": ["top_k", "temperature"], "top_k": 1}
        # Temperature before top-p, as in batchcore; behind top-k, whose choice it can't change,
        # it costs least.
        samplers = ["top_k", "temperature", "top_p"]
        return {**values, "samplers": samplers, "top_k": params.top_k, "top_p": params.top_p}

    def num_tokens(self, event: dict[str, Any], so_far: int, most: int) -> int:
        """Every event has the count; a token inside of a character comes with the next one."""
        del most
        count: int = event.get("tokens_predicted", so_far)
        return max(count, so_far)

    def num_cached_tokens(self, event: dict[str, Any]) -> int | None:
        """The last event says how many tokens were not computed."""
        cached: int | None = event.get("timings", {}).get("cache_n")
        return cached


class LlamaServer(HttpServer):
    """One of the configurations."""

    health = "/health"

    def __init__(self, name: str, program: Path) -> None:
        """Take one of `VARIANTS`."""
        super().__init__(name, program_version(program))
        self._path = program

    def command(self, setup: Setup, port: int, folder: Path) -> list[str]:
        """Program and arguments."""
        del folder
        command = [str(self._path), "-m", str(setup.model), "--host", "127.0.0.1"]
        command += ["--port", str(port), "-t", str(setup.n_threads), "-tb", str(setup.n_threads)]
        command += ["-np", str(setup.num_slots), "-c", str(setup.n_ctx), "--no-webui"]
        command += VARIANTS[self.name]
        if setup.keeps_prefixes:
            # Models with sliding windows reuse a prefix only if they keep all of its cells,
            # which is what batchcore does too.
            return [*command, "--swa-full"]
        # Nothing can be reused, so it need not save anything for that.
        return [*command, "--cache-ram", "0", "--ctx-checkpoints", "0"]

    def dialect(self, setup: Setup) -> LlamaServerDialect:
        """How it is spoken to."""
        del setup
        return LlamaServerDialect()
