#!/usr/bin/env python3
"""Put the pinned llama.cpp under vendor/llama.cpp, or move the pin.

The build runs `fetch.py populate`; people run `fetch.py bump VERSION`. Only the standard library is
used, because at build time there may be nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
LOCK_FILE = HERE / "llama.cpp.lock"
LICENSE_COPY = HERE / "LICENSE.llama.cpp"
STAMP = ".batchcore-stamp"

# What CMake reads when only the libraries are built. models/ and docs/ alone would be 110 MB more.
PARTS = (
    "CMakeLists.txt",
    "LICENSE",
    "licenses",
    "cmake",
    "ggml",
    "include",
    "src",
    "vendor/CMakeLists.txt",
    "vendor/hash",
    "vendor/miniaudio",
    "vendor/nlohmann",
    "vendor/sheredom",
    "vendor/stb",
)
# Upstream's own programs, for BATCHCORE_BUILD_PEERS.
PROGRAM_PARTS = (
    "common",
    "examples",
    "pocs",
    "scripts/ui-assets.cmake",
    "tools",
    "vendor/cpp-httplib",
)
# Present in every usable tree; checked so that a broken one is named before CMake stumbles over it.
LANDMARKS = ("CMakeLists.txt", "include/llama.h", "src/CMakeLists.txt", "ggml/CMakeLists.txt")
PROGRAM_LANDMARKS = (
    "common/CMakeLists.txt",
    "examples/CMakeLists.txt",
    "tools/CMakeLists.txt",
    "scripts/ui-assets.cmake",
)


class FetchError(Exception):
    """A failure with its remedy, meant to be shown as it is."""


@dataclass(frozen=True)
class Lock:
    """The pin: which sdist carries llama.cpp, and which upstream commit that is."""

    package: str
    version: str
    commit: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The pin as pip names it."""
        return f"{self.package}=={self.version}"


def read_lock(path: Path = LOCK_FILE) -> Lock:
    """Read the pin from `key = value` lines."""
    found = dict(re.findall(r"^(\w+) = (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        return Lock(found["package"], found["version"], found["commit"], found["sha256"])
    except KeyError as error:
        raise FetchError(f"{path} has no line for {error}; restore it with git.") from None


def write_lock(lock: Lock, path: Path = LOCK_FILE) -> None:
    """Write the pin; the comment lines on top of the file stay."""
    comments = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]
    fields = [f"{key} = {value}" for key, value in vars(lock).items()]
    path.write_text("\n".join([*comments, *fields]) + "\n", encoding="utf-8")


def sdist_cache() -> Path:
    """Where downloaded sdists are kept, next to the models that batchcore pulls."""
    override = os.environ.get("BATCHCORE_CACHE")
    if override:
        return Path(override).expanduser() / "sdist"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "batchcore" / "sdist"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchcore" / "sdist"


def sha256_of(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip_command() -> tuple[list[str], list[str], dict[str, str]]:
    """A pip that runs, options for its downloads, and its environment.

    In an isolated build, the interpreter sees only the build requirements and so no pip; without
    PYTHONPATH it is the user's own again. Where scikit_build_core is at hand, pip need not fetch it
    a second time to read the sdist.
    """
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pip"]
    if (
        subprocess.run(
            [*command, "--version"], env=env, capture_output=True, check=False
        ).returncode
        != 0
    ):
        program = shutil.which("pip3") or shutil.which("pip")
        if program is None:
            raise FetchError(
                "there is no pip to download with: python -m ensurepip, or see vendor/README.md."
            )
        return [program], [], env
    backend = importlib.util.find_spec("scikit_build_core")
    if backend is None or backend.origin is None:
        return command, [], env
    env["PYTHONPATH"] = str(Path(backend.origin).parents[1])
    return command, ["--no-build-isolation"], env


def pip_download(requirement: str, folder: Path) -> Path:
    """Download one sdist by name into `folder`."""
    package = requirement.partition("==")[0]
    command, options, env = pip_command()
    # For this package only: with :all: pip would compile the sdist's build requirements too.
    options = [*options, "--quiet", "--no-deps", f"--no-binary={package}", f"--dest={folder}"]
    result = subprocess.run(
        [*command, "download", *options, requirement],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    sdists = sorted(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(sdists) != 1:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise FetchError(
            f"pip could not download {requirement}:\n"
            + "\n".join(f"    {line}" for line in said[-8:])
            + "\n  Without a network, download it elsewhere with\n"
            f"    pip download --no-deps --no-binary={package} {requirement}\n"
            "  and set BATCHCORE_LLAMA_CPP_SDIST to it, or BATCHCORE_LLAMA_CPP_DIR to a checkout."
        )
    return sdists[0]


def get_sdist(lock: Lock, given: Path | None) -> Path:
    """The pinned sdist, verified: the one given, the cached one, or a fresh download."""
    if given is not None:
        if not given.is_file():
            raise FetchError(f"BATCHCORE_LLAMA_CPP_SDIST: there is no file {given}.")
        verify(
            given, lock, f"Download {lock.requirement} again, or unset BATCHCORE_LLAMA_CPP_SDIST."
        )
        return given
    cache = sdist_cache()
    cached = cache / f"{lock.package}-{lock.version}.tar.gz"
    if cached.is_file():
        if sha256_of(cached) == lock.sha256:
            return cached
        cached.unlink()  # damaged on disk: fetch it anew
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        sdist = pip_download(lock.requirement, Path(folder))
        verify(
            sdist, lock, "Check the package index that pip uses (pip config list), then try again."
        )
        sdist.replace(cached)
    return cached


def verify(sdist: Path, lock: Lock, remedy: str) -> None:
    """Raise unless the file is what the lock pins."""
    actual = sha256_of(sdist)
    if actual != lock.sha256:
        raise FetchError(
            f"{sdist} is not the pinned {lock.requirement}.\n"
            f"  sha256 wanted: {lock.sha256}\n  sha256 found:  {actual}\n  {remedy}"
        )


def unpack(sdist: Path, lock: Lock, target: Path, *, programs: bool = False) -> None:
    """Unpack what the build needs into `target`, which appears complete or not at all."""
    parts = PARTS + PROGRAM_PARTS if programs else PARTS
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".populate-", dir=target.parent) as folder:
        tree = Path(folder) / "llama.cpp"
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = wanted(member, parts)
                if name is not None:
                    write_member(archive, member, tree / name)
        missing = missing_landmarks(tree, programs=programs)
        if missing:
            raise FetchError(f"{sdist} carries no usable llama.cpp: {', '.join(missing)} missing.")
        (tree / STAMP).write_text(lock.sha256 + "\n", encoding="utf-8")
        try:
            tree.rename(target)
        except OSError:
            # Else another build was quicker, which is as good.
            if not is_populated(target, lock, programs=programs):
                raise


def missing_landmarks(tree: Path, *, programs: bool) -> list[str]:
    """What shows that a tree is incomplete."""
    names = LANDMARKS + PROGRAM_LANDMARKS if programs else LANDMARKS
    return [name for name in names if not (tree / name).is_file()]


def wanted(member: tarfile.TarInfo, wanted_parts: tuple[str, ...]) -> str | None:
    """The member's path inside llama.cpp, if it is a file we build with."""
    parts = PurePosixPath(member.name).parts
    if not member.isfile() or parts[1:3] != ("vendor", "llama.cpp") or ".." in parts:
        return None
    name = "/".join(parts[3:])
    is_wanted = any(name == part or name.startswith(part + "/") for part in wanted_parts)
    return name if is_wanted else None


def write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file, with the time it had: a second unpacking then rebuilds nothing."""
    source = archive.extractfile(member)
    assert source is not None  # wanted() let regular files through only
    path.parent.mkdir(parents=True, exist_ok=True)
    with source, path.open("wb") as file:
        shutil.copyfileobj(source, file)
    os.utime(path, (member.mtime, member.mtime))


def is_populated(target: Path, lock: Lock, *, programs: bool = False) -> bool:
    """Whether this script filled `target` from the sdist that is pinned now, with the programs."""
    stamp = target / STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").strip() != lock.sha256:
        return False
    return not programs or not missing_landmarks(target, programs=True)


def check_tree(tree: Path, origin: str, remedy: str, *, programs: bool = False) -> Path:
    """Raise unless `tree` looks like llama.cpp."""
    missing = missing_landmarks(tree, programs=programs)
    if missing:
        raise FetchError(
            f"{origin} {tree} is not a complete llama.cpp: {missing[0]} is missing.\n  {remedy}"
        )
    return tree


def populate(
    lock: Lock, target: Path, fallback: Path, sdist: Path | None = None, *, programs: bool = False
) -> Path:
    """Return a llama.cpp tree, making it at `target` if it is not there.

    A tree without our stamp belongs to the user and is used as it is. `fallback` is for a `target`
    whose parent cannot be written.
    """
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # what git leaves of a removed checkout
    if target.exists() and not (target / STAMP).is_file():
        return check_tree(
            target,
            "the folder",
            f"Delete {target} and build again: it will be populated anew.",
            programs=programs,
        )
    if is_populated(target, lock, programs=programs):
        return check_tree(
            target,
            "the populated folder",
            f"Delete {target} and build again.",
            programs=programs,
        )
    if not os.access(target.parent, os.W_OK):
        target = fallback
        if is_populated(target, lock, programs=programs):
            return target
    archive = get_sdist(lock, sdist)
    if target.exists():
        shutil.rmtree(target)  # ours, from an older pin or without the programs
    unpack(archive, lock, target, programs=programs)
    return target


def commit_of(tree: Path, lock: Lock) -> str:
    """The upstream commit of `tree`: the pin's if we unpacked it, else what git says of a clone."""
    if (tree / STAMP).is_file():
        return lock.commit
    if (tree / ".git").exists():
        result = subprocess.run(
            ["git", "-C", str(tree), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0:
            return result.stdout.strip()
    return "unknown"


def commit_in_sdist(sdist: Path) -> str | None:
    """The upstream commit, where the sdist happens to carry its submodule's HEAD."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.endswith(".git/modules/vendor/llama.cpp/HEAD"):
                file = archive.extractfile(member)
                text = file.read().decode().strip() if file else ""
                return text if re.fullmatch(r"[0-9a-f]{40}", text) else None
    return None


def bump(version: str, commit: str | None, sdist: Path | None = None) -> Lock:
    """Move the pin to another version of the package, and refresh our copy of its licence."""
    old = read_lock()
    with tempfile.TemporaryDirectory() as folder:
        sdist = sdist or pip_download(f"{old.package}=={version}", Path(folder))
        commit = commit or commit_in_sdist(sdist)
        if commit is None:
            raise FetchError("this sdist does not say its llama.cpp commit; give it with --commit.")
        lock = Lock(old.package, version, commit, sha256_of(sdist))
        tree = Path(folder) / "llama.cpp"
        unpack(sdist, lock, tree)
        shutil.copyfile(tree / "LICENSE", LICENSE_COPY)
        write_lock(lock)
    return lock


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two commands; a failure goes to stderr in words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("populate", help="make the tree; print its path and commit")
    one.add_argument("--target", type=Path, default=HERE / "llama.cpp")
    one.add_argument("--fallback", type=Path, default=HERE / "llama.cpp")
    one.add_argument(
        "--dir", type=Path, help="use this llama.cpp instead (BATCHCORE_LLAMA_CPP_DIR)"
    )
    one.add_argument(
        "--sdist",
        type=Path,
        help="use this sdist instead of a download (BATCHCORE_LLAMA_CPP_SDIST)",
    )
    one.add_argument("--programs", action="store_true", help="with upstream's own programs")
    two = commands.add_parser("bump", help="move the pin")
    two.add_argument("version")
    two.add_argument("--commit", help="upstream commit, if the sdist does not carry it")
    two.add_argument("--sdist", type=Path, help="an sdist that is already here")
    options = parser.parse_args(arguments)
    try:
        if options.command == "bump":
            lock = bump(options.version, options.commit, options.sdist)
            print(f"pinned {lock.requirement} (llama.cpp {lock.commit}); rebuild, test, commit.")
            return 0
        lock = read_lock()
        if options.dir is not None:
            tree = check_tree(
                options.dir.resolve(),
                "BATCHCORE_LLAMA_CPP_DIR",
                "Point it at a llama.cpp checkout.",
                programs=options.programs,
            )
        else:
            tree = populate(
                lock, options.target, options.fallback, options.sdist, programs=options.programs
            )
        print(f"{tree};{commit_of(tree, lock)}")
    except (FetchError, OSError, tarfile.TarError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
