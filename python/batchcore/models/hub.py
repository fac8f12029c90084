"""Models named `hf:owner/repo/file.gguf`: huggingface_hub (the `hf` extra) gets and keeps them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from batchcore.errors import ModelDownloadError, ModelLoadError

__all__ = ["PREFIX", "pull_from_hub"]

PREFIX = "hf:"

# llama.cpp opens the first file of a split model and finds the others beside it.
_SPLIT = re.compile(r"-00001-of-(\d{5})\.gguf$")


def pull_from_hub(name: str) -> Path:
    """Return the local path of `hf:owner/repo/file.gguf`, downloaded on first use.

    The file may lie in a folder of the repository. Of a split model, name the first file; the
    others are downloaded too.

    Raises:
        ModelLoadError: The name does not have this form.
        ModelDownloadError: huggingface_hub is missing, or it can't get the file.
    """
    owner, repo, file_name = _parse(name)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelDownloadError(
            f"{name} needs huggingface_hub: pip install 'batchcore[hf]'", model=name, reason="extra"
        ) from error
    files = [file_name]
    if split := _SPLIT.search(file_name):
        count = int(split[1])
        stem = file_name[: split.start()]
        files = [f"{stem}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    try:
        paths = [hub.hf_hub_download(repo_id=f"{owner}/{repo}", filename=each) for each in files]
    except Exception as error:  # its errors come from three libraries and have no common base
        raise ModelDownloadError(f"could not get {name}: {error}", model=name) from error
    return Path(paths[0])


def _parse(name: str) -> tuple[str, str, str]:
    pieces = name.removeprefix(PREFIX).split("/", 2)
    if len(pieces) != 3 or not all(pieces) or not pieces[2].endswith(".gguf"):
        raise ModelLoadError(f"{name!r} is not of the form hf:owner/repo/file.gguf")
    return pieces[0], pieces[1], pieces[2]
