"""The cache folder on disk, and the lock that lets one process at a time fill a part of it.

Layout: `models/<preset>/` holds finished files only, `downloads/<preset>/` the wheels of a pull
that isn't finished, `locks/` one empty file per preset.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchcore.models.presets import Preset

__all__ = ["cache_dir", "downloads_dir", "exclusive_lock", "model_path"]

_LOCK_POLL_S = 0.1


def cache_dir() -> Path:
    """Where models are kept: `BATCHCORE_CACHE`, else the platform's folder for caches."""
    override = os.environ.get("BATCHCORE_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "batchcore" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "batchcore"
    # The XDG specification says to ignore a relative path.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base_dir = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return base_dir / "batchcore"


def model_path(preset: Preset) -> Path:
    """Where the finished GGUF of a preset lies, or will lie."""
    return cache_dir() / "models" / preset.name / preset.file_name


def downloads_dir(preset: Preset) -> Path:
    """Where the wheels of a preset are kept until its GGUF is verified."""
    return cache_dir() / "downloads" / preset.name


def _try_lock(descriptor: int) -> bool:
    """Take the lock without waiting; it is released when the descriptor is closed."""
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl  # noqa: PLC0415

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: files are still put in place atomically, so all that is lost
        # is that two processes may download the same bytes.
        return True
    return True


@contextmanager
def exclusive_lock(name: str, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the cache's lock called `name`, across processes and threads.

    The operating system drops it when its holder dies, so nothing needs to be cleaned up.

    Args:
        name: What is locked.
        on_wait: Called once if someone else holds it.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            on_wait()
            # Polled, because a blocking call could not be interrupted on every platform.
            while not _try_lock(descriptor):
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
