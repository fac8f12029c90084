"""The one entry point for developers: `nox -l` lists what there is."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "ctest", "lint"]

CPP_FILES = sorted(
    str(path)
    for folder in ("csrc", "tests", "cmake")
    for path in Path(folder).rglob("*")
    if path.suffix in {".h", ".cpp"}
)
JOBS = str(os.cpu_count() or 1)
BUILD_TOOLS = ("scikit-build-core>=1.0", "pybind11>=3.0,<4", "cmake>=3.24", "ninja")


@nox.session
def tests(session: nox.Session) -> None:
    """Install the package as a user would, and run the Python tests against it."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


def _run_cpp_tests(session: nox.Session, *presets: str) -> None:
    session.install("cmake>=3.24", "ninja")
    for preset in presets:
        session.run("cmake", "--preset", preset)
        session.run("cmake", "--build", "--preset", preset)
        session.run("ctest", "--preset", preset, "--parallel", JOBS, *session.posargs)


@nox.session
def ctest(session: nox.Session) -> None:
    """Build and run the C++ tests with debug checks."""
    _run_cpp_tests(session, "dev")


@nox.session
@nox.parametrize("sanitizer", ["asan", "tsan"])
def sanitize(session: nox.Session, sanitizer: str) -> None:
    """Build and run the C++ tests under ASan+UBSan, or under TSan."""
    _run_cpp_tests(session, sanitizer)


@nox.session
def kernels(session: nox.Session) -> None:
    """Build ggml, and run the tests of the kernels inside it."""
    _run_cpp_tests(session, "kernels")


@nox.session
def lint(session: nox.Session) -> None:
    """Run every linter and type checker; stubtest needs the package installed."""
    session.install(".[dev,hf,plot]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run(
        "stubtest", "batchcore._core", "batchcore._cpu", "--mypy-config-file=pyproject.toml"
    )
    session.run("clang-format", "--dry-run", "-Werror", *CPP_FILES)
    session.run("codespell")


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make (or remake) the editable install in the environment that nox runs from."""
    session.run("python", "-m", "pip", "install", *BUILD_TOOLS)
    session.run(
        "python",
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "-Cbuild-dir=build/editable",
        "-Ceditable.rebuild-dir=build/editable/install",
        "-Ceditable.rebuild=false",
        "-e",
        ".[dev]",
    )
