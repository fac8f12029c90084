"""Fixtures for projects that test or benchmark with a batchcore engine; pytest finds it by itself.

A package of its own, so that nothing of batchcore is imported before a fixture needs it.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchcore import Engine, Model

_DEFAULT_MODEL = "smollm2-135m"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and settings of the fixtures."""
    group = parser.getgroup("batchcore")
    group.addoption(
        "--batchcore-model",
        metavar="MODEL",
        help="Path, preset or hf:owner/repo/file.gguf for the batchcore fixtures.",
    )
    parser.addini("batchcore_model", "The same in a configuration file.", default=_DEFAULT_MODEL)
    parser.addini(
        "batchcore_engine_options",
        "Options of batchcore.Engine for the fixture, one NAME=VALUE per line.",
        type="linelist",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "batchcore_device(name): skip where batchcore sees no such device, e.g. 'cuda' or 'gpu'",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device that is not there."""
    for marker in item.iter_markers("batchcore_device"):
        wanted = str(marker.args[0]) if marker.args else str(marker.kwargs.get("name", "gpu"))
        names = _device_names()
        if not any(wanted.lower() in name for name in names):
            pytest.skip(f"needs the device {wanted!r}; there is {', '.join(names)}")


def _device_names() -> list[str]:
    from batchcore import _core  # noqa: PLC0415

    return [
        f"{device['name']} {device['type']} {device.get('backend', '')}".lower().strip()
        for device in _core.devices()
    ]


def _engine_options(lines: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for line in lines:
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not name:
            raise pytest.UsageError(f"batchcore_engine_options: {line!r} is not NAME=VALUE")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@pytest.fixture(scope="session")
def batchcore_model(pytestconfig: pytest.Config) -> Model:
    """The model named by `--batchcore-model` or the setting, loaded once."""
    from batchcore import Model  # noqa: PLC0415

    name = pytestconfig.getoption("--batchcore-model") or pytestconfig.getini("batchcore_model")
    return Model(name)


@pytest.fixture(scope="module")
def batchcore_engine(batchcore_model: Model, pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An engine over `batchcore_model`, new for each test module and closed behind it."""
    from batchcore import Engine  # noqa: PLC0415

    options = _engine_options(pytestconfig.getini("batchcore_engine_options"))
    with Engine(batchcore_model, **options) as engine:
        yield engine
