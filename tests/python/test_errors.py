"""The error tree: its shape, its attributes, and that errors survive pickling and copying."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from batchcore import errors

TREE = {
    "BatchcoreError": {"Exception"},
    "ConfigError": {"BatchcoreError", "ValueError"},
    "ModelLoadError": {"BatchcoreError"},
    "ModelDownloadError": {"ModelLoadError"},
    "RequestError": {"BatchcoreError"},
    "InvalidRequestError": {"RequestError", "ValueError"},
    "PromptTooLongError": {"InvalidRequestError"},
    "QueueFullError": {"RequestError"},
    "RequestTimeoutError": {"RequestError", "TimeoutError"},
    "EngineError": {"BatchcoreError"},
    "EngineClosedError": {"EngineError"},
    "DecodeError": {"EngineError"},
    "StaleViewError": {"BatchcoreError"},
    "ViewInUseError": {"BatchcoreError", "BufferError"},
}

ATTRIBUTES: dict[str, dict[str, object]] = {
    "ModelDownloadError": {"model": "smollm2-135m", "reason": "disk"},
    "RequestError": {"request_id": 7},
    "InvalidRequestError": {"request_id": "a"},
    "PromptTooLongError": {"num_tokens": 9000, "limit": 8192, "request_id": 7},
    "QueueFullError": {"capacity": 1024, "retry_after_s": 0.5, "request_id": None},
    "RequestTimeoutError": {"request_id": 7},
    "DecodeError": {"status": -2},
}


def make(name: str) -> errors.BatchcoreError:
    error = getattr(errors, name)("it went wrong", **ATTRIBUTES.get(name, {}))
    assert isinstance(error, errors.BatchcoreError)
    return error


def test_tree_is_the_documented_one() -> None:
    found = {
        name: {base.__name__ for base in getattr(errors, name).__bases__} for name in errors.__all__
    }
    assert found == TREE


@pytest.mark.parametrize("name", errors.__all__)
def test_docstring_says_when(name: str) -> None:
    first_line = (getattr(errors, name).__doc__ or "").splitlines()[0]
    assert first_line.startswith(("Raised", "Base"))
    assert first_line.endswith(".")


@pytest.mark.parametrize("name", errors.__all__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_message_and_attributes(name: str, protocol: int) -> None:
    error = make(name)
    error.__dict__["__notes__"] = ["a note"]  # what add_note does, on 3.10 too
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert type(twin) is type(error)
    assert str(twin) == "it went wrong"
    assert twin.args == error.args
    assert twin.__dict__ == error.__dict__


@pytest.mark.parametrize("name", errors.__all__)
def test_copy_keeps_attributes(name: str) -> None:
    error = make(name)
    assert copy.copy(error).__dict__ == error.__dict__
    assert str(copy.deepcopy(error)) == str(error)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_readable(name: str) -> None:
    error = make(name)
    for key, value in ATTRIBUTES[name].items():
        assert getattr(error, key) == value


def test_request_id_is_optional() -> None:
    assert errors.RequestError("x").request_id is None
    assert errors.RequestTimeoutError("x").request_id is None


def test_standard_bases_catch() -> None:
    with pytest.raises(ValueError, match="too long"):
        raise errors.PromptTooLongError("too long", num_tokens=2, limit=1)
    with pytest.raises(TimeoutError, match="late"):
        raise errors.RequestTimeoutError("late", request_id=1)


def test_errors_module_imports_nothing_but_typing() -> None:
    # Loaded from its file, so that the package's own __init__ is not part of the count.
    code = (
        "import sys, typing, __future__\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('e', {errors.__file__!r})\n"
        "m = importlib.util.module_from_spec(spec)\n"
        "before = set(sys.modules)\n"
        "spec.loader.exec_module(m)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
