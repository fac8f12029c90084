"""Finding models: a path, the name of a preset, or `hf:owner/repo/file.gguf`.

Everything in batchcore that takes a model passes it through `resolve`. Presets are pulled on first
use into the cache folder (`BATCHCORE_CACHE`, else the platform's), verified, and kept.

Importing this module is cheap: what a pull needs is imported when one happens.
"""

from __future__ import annotations

import os
from pathlib import Path

from batchcore.errors import ModelLoadError
from batchcore.models.cache import cache_dir, model_path
from batchcore.models.presets import DEFAULT_PRESET, PRESETS, Preset, find_preset

__all__ = [
    "DEFAULT_PRESET",
    "Preset",
    "cache_dir",
    "list_presets",
    "path",
    "pull",
    "resolve",
]


def list_presets() -> list[Preset]:
    """All presets, the default one first."""
    return list(PRESETS.values())


def path(name: str) -> Path | None:
    """Path of a preset's GGUF if it has been pulled, else None.

    Raises:
        ModelLoadError: No preset has this name.
    """
    preset = find_preset(name)
    found = model_path(preset)
    return found if found.is_file() and found.stat().st_size == preset.size_bytes else None


def pull(name: str, *, progress: bool = False, verify: bool = False) -> Path:
    """Make sure that a preset is in the cache, and return the path of its GGUF.

    Args:
        name: Of a preset.
        progress: Show a bar on stderr.
        verify: Check the SHA-256 of what is in the cache already; pull it again if it is damaged.

    Raises:
        ModelLoadError: No preset has this name.
        ModelDownloadError: The preset can't be pulled; see its `reason`.
    """
    preset = find_preset(name)
    from batchcore.models.pulling import pull_preset  # noqa: PLC0415

    return pull_preset(preset, progress=progress, verify=verify)


def resolve(model: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Return the path of the GGUF that `model` means.

    A file that exists wins over a preset of the same name.

    Args:
        model: A path, the name of a preset (pulled on first use), or `hf:owner/repo/file.gguf`.
        progress: Show a bar on stderr if something is pulled.

    Raises:
        ModelLoadError: There is no such file or preset.
        ModelDownloadError: It can't be pulled; see its `reason`.
    """
    name = os.fspath(model)
    if isinstance(model, str) and name.startswith("hf:"):
        from batchcore.models.hub import pull_from_hub  # noqa: PLC0415

        return pull_from_hub(name)
    file = Path(name).expanduser()
    if file.is_file():
        return file
    if isinstance(model, str) and name in PRESETS:
        return pull(name, progress=progress)
    if file.is_dir():
        raise ModelLoadError(f"{file} is a folder; pass the path of a GGUF file")
    if not isinstance(model, str) or len(file.parts) > 1 or file.suffix:
        raise ModelLoadError(f"no such file: {file}")
    find_preset(name)
    raise AssertionError  # unreachable: find_preset raises for a name that isn't in PRESETS
