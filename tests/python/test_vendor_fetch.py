"""vendor/fetch.py: the pinned llama.cpp is put in place whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "vendor" / "fetch.py"

TREE = {
    "CMakeLists.txt": "project(llama)",
    "LICENSE": "upstream's licence",
    "include/llama.h": "#pragma once",
    "src/CMakeLists.txt": "",
    "ggml/CMakeLists.txt": "",
    "models/ggml-vocab-big.gguf": "not needed to build",
    "vendor/stb/CMakeLists.txt": "",
    "vendor/cpp-httplib/CMakeLists.txt": "not needed either",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("BATCHCORE_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("vendor_fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vendor_fetch", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "pip_download", no_network)
    return module


def no_network(requirement: str, folder: Path) -> Path:
    raise AssertionError(f"nothing should be downloaded, but {requirement} was")


def make_sdist(path: Path, tree: dict[str, str]) -> Path:
    files = {f"llama_cpp_python-1.0/vendor/llama.cpp/{name}": text for name, text in tree.items()}
    files["llama_cpp_python-1.0/.git/modules/vendor/llama.cpp/HEAD"] = COMMIT + "\n"
    files["llama_cpp_python-1.0/vendor/other/README"] = "beside llama.cpp"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            member.mtime = 1_600_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def lock_for(fetch: ModuleType, sdist: Path):
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    return fetch.Lock("llama-cpp-python", "1.0", COMMIT, digest)


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return make_sdist(tmp_path / "given" / "llama_cpp_python-1.0.tar.gz", TREE)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "vendor").mkdir()
    return tmp_path / "vendor" / "llama.cpp"


def test_only_what_is_built_is_unpacked(fetch, sdist, target):
    assert fetch.populate(lock_for(fetch, sdist), target, target, sdist) == target
    unpacked = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    skipped = {"models/ggml-vocab-big.gguf", "vendor/cpp-httplib/CMakeLists.txt"}
    assert unpacked == set(TREE) - skipped | {fetch.STAMP}
    assert (target / "include/llama.h").stat().st_mtime == 1_600_000_000
    assert [p.name for p in target.parent.iterdir()] == ["llama.cpp"]  # no scratch folder stays


PROGRAMS = {
    "common/CMakeLists.txt": "",
    "examples/CMakeLists.txt": "",
    "tools/CMakeLists.txt": "",
    "scripts/ui-assets.cmake": "",
}


def test_upstreams_programs_are_added_when_they_are_asked_for(fetch, target, tmp_path):
    sdist = make_sdist(tmp_path / "programs.tar.gz", TREE | PROGRAMS)
    lock = lock_for(fetch, sdist)
    fetch.populate(lock, target, target, sdist)
    assert not (target / "tools").exists()
    fetch.populate(lock, target, target, sdist, programs=True)
    assert all((target / name).is_file() for name in PROGRAMS)
    assert (target / "vendor/cpp-httplib/CMakeLists.txt").is_file()
    sdist.unlink()
    fetch.populate(lock, target, target)  # a build without them takes the tree as it is
    assert (target / "tools").exists()


def test_sdist_without_upstreams_programs(fetch, sdist, target):
    with pytest.raises(fetch.FetchError, match=r"common/CMakeLists\.txt"):
        fetch.populate(lock_for(fetch, sdist), target, target, sdist, programs=True)


def test_second_time_touches_nothing(fetch, sdist, target):
    lock = lock_for(fetch, sdist)
    fetch.populate(lock, target, target, sdist)
    sdist.unlink()
    assert fetch.populate(lock, target, target) == target


def test_download_is_verified_cached_and_reused(fetch, sdist, target, tmp_path, monkeypatch):
    calls = []

    def pip_download(requirement: str, folder: Path) -> Path:
        calls.append(requirement)
        return Path(shutil.copy(sdist, folder))

    lock = lock_for(fetch, sdist)
    monkeypatch.setattr(fetch, "pip_download", pip_download)
    fetch.populate(lock, target, target)
    fetch.populate(lock, tmp_path / "elsewhere", tmp_path / "elsewhere")
    assert calls == ["llama-cpp-python==1.0"]


def test_damaged_cache_is_fetched_anew(fetch, sdist, target, monkeypatch):
    cached = fetch.sdist_cache() / "llama-cpp-python-1.0.tar.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a file")

    def pip_download(requirement: str, folder: Path) -> Path:
        return Path(shutil.copy(sdist, folder))

    lock = lock_for(fetch, sdist)
    monkeypatch.setattr(fetch, "pip_download", pip_download)
    assert fetch.populate(lock, target, target) == target
    assert fetch.sha256_of(cached) == lock.sha256


def test_wrong_hash_of_a_download(fetch, sdist, target, tmp_path, monkeypatch):
    def tampered(requirement: str, folder: Path) -> Path:
        return make_sdist(folder / sdist.name, TREE | {"LICENSE": "tampered with"})

    lock = lock_for(fetch, sdist)
    monkeypatch.setattr(fetch, "pip_download", tampered)
    with pytest.raises(fetch.FetchError, match=f"sha256 wanted: {lock.sha256}"):
        fetch.populate(lock, target, target)
    assert not target.exists()
    assert list(fetch.sdist_cache().iterdir()) == []  # the next try downloads again


def test_wrong_hash_of_a_given_sdist_then_the_right_one(fetch, sdist, target, tmp_path):
    other = make_sdist(tmp_path / "other.tar.gz", TREE | {"LICENSE": "another"})
    lock = lock_for(fetch, sdist)
    with pytest.raises(fetch.FetchError, match="unset BATCHCORE_LLAMA_CPP_SDIST"):
        fetch.populate(lock, target, target, other)
    assert not target.exists()
    assert fetch.populate(lock, target, target, sdist) == target


def test_given_sdist_is_not_there(fetch, sdist, target, tmp_path):
    with pytest.raises(fetch.FetchError, match="there is no file"):
        fetch.populate(lock_for(fetch, sdist), target, target, tmp_path / "nowhere.tar.gz")


def test_interrupted_unpacking_leaves_nothing(fetch, sdist, target, monkeypatch):
    lock = lock_for(fetch, sdist)
    write_member = fetch.write_member

    def full_disk(archive, member, path):
        if path.name == "llama.h":
            raise OSError(28, "No space left on device")
        write_member(archive, member, path)

    monkeypatch.setattr(fetch, "write_member", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fetch.populate(lock, target, target, sdist)
    assert list(target.parent.iterdir()) == []
    monkeypatch.setattr(fetch, "write_member", write_member)
    assert fetch.populate(lock, target, target, sdist) == target


def test_sdist_without_llama_cpp(fetch, target, tmp_path):
    sdist = make_sdist(tmp_path / "empty.tar.gz", {"LICENSE": ""})
    with pytest.raises(fetch.FetchError, match=r"carries no usable llama\.cpp"):
        fetch.populate(lock_for(fetch, sdist), target, target, sdist)
    assert not target.exists()


def test_half_written_folder_names_the_remedy(fetch, sdist, target):
    (target / "include").mkdir(parents=True)
    (target / "include/llama.h").write_text("")
    with pytest.raises(fetch.FetchError, match=r"not a complete llama\.cpp.*\n.*Delete"):
        fetch.populate(lock_for(fetch, sdist), target, target, sdist)


def test_empty_folder_counts_as_none(fetch, sdist, target):
    target.mkdir()
    assert fetch.populate(lock_for(fetch, sdist), target, target, sdist) == target
    assert (target / "include/llama.h").is_file()


def test_a_folder_of_the_users_is_used_as_it_is(fetch, sdist, target):
    for name, text in TREE.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text + " edited")
    assert fetch.populate(lock_for(fetch, sdist), target, target, sdist) == target
    assert (target / "LICENSE").read_text().endswith("edited")
    assert fetch.commit_of(target, lock_for(fetch, sdist)) == "unknown"


def test_moved_pin_populates_anew(fetch, sdist, target, tmp_path):
    fetch.populate(lock_for(fetch, sdist), target, target, sdist)
    newer = make_sdist(tmp_path / "newer.tar.gz", TREE | {"LICENSE": "a new licence"})
    fetch.populate(lock_for(fetch, newer), target, target, newer)
    assert (target / "LICENSE").read_text() == "a new licence"


def test_read_only_vendor_uses_the_build_folder(fetch, sdist, target, tmp_path, monkeypatch):
    fallback = tmp_path / "build" / "llama.cpp-source"
    monkeypatch.setattr(fetch.os, "access", lambda path, mode: False)  # root may write anywhere
    assert fetch.populate(lock_for(fetch, sdist), target, fallback, sdist) == fallback
    assert fetch.populate(lock_for(fetch, sdist), target, fallback) == fallback
    assert not target.exists()


def test_path_outside_the_tree_is_ignored(fetch, target, tmp_path):
    sdist = make_sdist(tmp_path / "evil.tar.gz", TREE | {"src/../../../../evil": "!"})
    fetch.populate(lock_for(fetch, sdist), target, target, sdist)
    assert not list(tmp_path.rglob("evil"))


def test_offline_names_the_remedy(tmp_path):
    """The real pip, with an index that refuses connections."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
        "BATCHCORE_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
    }
    target = tmp_path / "llama.cpp"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "populate", f"--target={target}", f"--fallback={target}"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "pip could not download llama-cpp-python==" in result.stderr
    assert "set BATCHCORE_LLAMA_CPP_SDIST" in result.stderr
    assert "Traceback" not in result.stderr
    assert not target.exists()


def test_dir_override(fetch, capsys, tmp_path):
    tree = tmp_path / "mine"
    assert fetch.main(["populate", f"--dir={tree}"]) == 1
    assert "BATCHCORE_LLAMA_CPP_DIR" in capsys.readouterr().err
    for name in TREE:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    assert fetch.main(["populate", f"--dir={tree}"]) == 0
    assert capsys.readouterr().out == f"{tree};unknown\n"


def test_bump_writes_the_lock_and_the_licence(fetch, sdist, tmp_path, monkeypatch, capsys):
    lock_file = tmp_path / "llama.cpp.lock"
    lock_file.write_text(
        "# why\npackage = llama-cpp-python\nversion = 0.9\ncommit = old\nsha256 = old\n"
    )
    monkeypatch.setattr(fetch, "LICENSE_COPY", tmp_path / "LICENSE.llama.cpp")
    read_lock, write_lock = fetch.read_lock, fetch.write_lock
    monkeypatch.setattr(fetch, "read_lock", lambda: read_lock(lock_file))
    monkeypatch.setattr(fetch, "write_lock", lambda lock: write_lock(lock, lock_file))
    assert fetch.main(["bump", "1.0", f"--sdist={sdist}"]) == 0
    assert read_lock(lock_file) == lock_for(fetch, sdist)
    assert lock_file.read_text().startswith("# why\n")
    assert (tmp_path / "LICENSE.llama.cpp").read_text() == "upstream's licence"


def test_lock_with_a_missing_line(fetch, tmp_path):
    lock_file = tmp_path / "llama.cpp.lock"
    lock_file.write_text("package = llama-cpp-python\n")
    with pytest.raises(fetch.FetchError, match="'version'"):
        fetch.read_lock(lock_file)
