"""Memory: what a batch size will take, what there is, and what is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from batchcore import _core

if TYPE_CHECKING:
    from batchcore.bench.model_cost import ModelCost
    from batchcore.model import Model

__all__ = ["free_bytes", "kv_bytes", "needed_bytes", "used_bytes", "why_not"]

_RESERVE = 0.05  # of all memory: for the system, which starts to swap before there is none
_UBATCH_TOKENS = 512
_ACTIVATIONS = 16  # vectors of a token that are alive at once, roughly
_F16_BYTES = 2
_GROUP = re.compile(r"\d+:(memory)?:(.*)")


def kv_bytes(model: Model, cost: ModelCost | None, num_seqs: int, cells_per_seq: int) -> int:
    """What an engine allocates for KV cells and recurrent states, by the shapes of the model."""
    if cost is None:
        head_dim = model.n_embd // max(1, model.n_head)
        per_token = 2 * model.n_layer * model.n_head_kv * head_dim * _F16_BYTES
        return num_seqs * cells_per_seq * per_token
    # All cells also of layers with a window: the engine keeps them (swa_full).
    per_token = sum(layer.bytes_per_token for layer in cost.attention)
    return num_seqs * (cells_per_seq * per_token + cost.state_bytes_per_sequence)


def needed_bytes(model: Model, kv_cells_bytes: int, num_seqs: int) -> int:
    """What an engine takes on top of the model: KV cells, logits and activations, roughly."""
    floats = num_seqs * model.n_vocab + _UBATCH_TOKENS * _ACTIVATIONS * model.n_embd
    return kv_cells_bytes + 4 * floats


def why_not(needed: int, free: int | None) -> str | None:
    """Why that much should not be allocated; None where it can be, or where nobody knows."""
    if free is None or needed <= free:
        return None
    return f"needs {needed / 1e9:.2f} GB on top of the model, and {free / 1e9:.2f} GB are free"


def free_bytes() -> int | None:
    """What can be allocated before the system starts to swap; with a GPU, what is free on it.

    Pages of a mapped model file count as free for the system, but not here: without them every
    step would read from the disk. None where psutil is missing.
    """
    gpus = _gpus()
    if gpus:
        total, free = (sum(gpu[i] for gpu in gpus) for i in (0, 1))
        return max(0, free - int(_RESERVE * total))
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    free = memory.available
    for limit, used in _group_limits():
        free = min(free, limit - used)
    mapped = getattr(psutil.Process().memory_info(), "shared", 0)
    return max(0, int(free - mapped - _RESERVE * memory.total))


def used_bytes() -> int | None:
    """Memory of this process, and what is taken on GPUs; None where psutil is missing."""
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415
    except ImportError:
        return None
    on_gpus = sum(total - free for total, free in _gpus())
    return int(psutil.Process().memory_info().rss) + on_gpus


def _gpus() -> list[tuple[int, int]]:
    """Total and free bytes of each GPU that this build uses."""
    return [
        (device["memory_total_bytes"], device["memory_free_bytes"])
        for device in _core.devices()
        if device["type"] in {"gpu", "igpu"}
    ]


def _group_limits(
    listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of the control groups that this process is in (Linux)."""
    found = []
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        match = _GROUP.fullmatch(line)
        if match is None:
            continue
        is_first_version = match[1] is not None
        top = root / "memory" if is_first_version else root
        names = ("limit_in_bytes", "usage_in_bytes") if is_first_version else ("max", "current")
        group = top / match[2].lstrip("/")
        # Every group above has its own limit, and in a container its root is all there is to see.
        for folder in (group, *group.parents):
            limit, used = (_read_number(folder / f"memory.{name}") for name in names)
            if limit is not None and used is not None:
                found.append((limit, used - _cached_file_bytes(folder / "memory.stat")))
            if folder == top:
                break
    return found


def _cached_file_bytes(stat: Path) -> int:
    """What a group uses for pages of files, which it can give back."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines if line.count(" ") == 1)
    return sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None
