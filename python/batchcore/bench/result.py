"""Results of benchmarks in files: figures with everything that they have to be read with."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.environment import describe_environment
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Metrics = dict[str, float | None]

__all__ = ["SCHEMA_VERSION", "BenchmarkResult", "BenchmarkRun", "write_text_atomically"]

SCHEMA_VERSION = 1
"""Of the files; files of another one are refused."""

_FORMAT = "batchcore-benchmark"
# What may be done about by trying again; all else needs another path.
_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True)
class BenchmarkRun:
    """One of the repetitions of a benchmark."""

    metrics: Metrics
    """Figures by name; the names end in a unit, e.g. `p99_ttft_ms`, `output_tokens_per_s`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, e.g. every request."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Figures of a benchmark, and where they come from. What is in it must fit into JSON."""

    kind: str
    """The benchmark, e.g. `serve`."""
    config: dict[str, Any]
    """What was asked for: options of the engine, workload, seed."""
    runs: tuple[BenchmarkRun, ...]
    """In the order in which they ran."""
    model: dict[str, Any] = field(default_factory=dict)
    """As `describe_model` gives it."""
    environment: dict[str, Any] = field(default_factory=describe_environment)
    """As `describe_environment` gives it, which is the default."""
    metrics: Metrics = field(default_factory=dict)
    """Of all runs together; where not given, the median of each figure."""

    def __post_init__(self) -> None:
        """Take the medians where there are no metrics."""
        object.__setattr__(self, "runs", tuple(self.runs))
        if not self.metrics:
            object.__setattr__(self, "metrics", _medians([run.metrics for run in self.runs]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: NaN becomes None, an infinite value `"inf"`."""
        values: dict[str, Any] = _for_json(
            {
                "format": _FORMAT,
                "schema_version": SCHEMA_VERSION,
                "kind": self.kind,
                "environment": self.environment,
                "model": self.model,
                "config": self.config,
                "metrics": _finite(self.metrics),
                "runs": [
                    {"metrics": _finite(run.metrics), "details": run.details} for run in self.runs
                ],
            }
        )
        return values

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to a JSON file, or nothing.

        Raises:
            ConfigError: The path can't be written, or something in it does not fit into JSON.
            OSError: The disk is full or broken.
        """
        try:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the result does not fit into JSON: {error}") from error
        write_text_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BenchmarkResult:
        """Read what `save` wrote.

        Raises:
            ConfigError: The file can't be read, is something else, or has another schema version.
        """
        try:
            values = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"can't read {os.fspath(path)}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{os.fspath(path)} is not JSON: {error}") from error
        try:
            return _from_json(values)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in UTF-8 so that others see all of it or what was there before.

    Raises:
        ConfigError: The path can't be written.
        OSError: The disk is full or broken.
    """
    partial = None
    try:
        target = Path(path)
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_text(text, encoding="utf-8")  # a pipe or a device: never to be replaced
            return
        target = Path(os.path.realpath(target))  # a link stays one
        partial = target.with_name(f".{secrets.token_hex(8)}.partial")
        with partial.open("x", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise ConfigError(f"can't write {os.fspath(path)}: {error.strerror}") from error
    finally:
        if partial is not None:
            with suppress(OSError):  # nothing to remove, as after success
                partial.unlink()


def _from_json(values: Any) -> BenchmarkResult:
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ConfigError("not the result of a benchmark")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"has schema version {version}, and this batchcore reads {SCHEMA_VERSION}"
        )
    found = {name: _take(values, name, dict) for name in ("config", "model", "environment")}
    runs = []
    for run in _take(values, "runs", list):
        if not isinstance(run, dict):
            raise ConfigError("runs: each must be an object")
        runs.append(BenchmarkRun(_take_metrics(run), _take(run, "details", dict)))
    kind = _take(values, "kind", str)
    return BenchmarkResult(kind=kind, runs=tuple(runs), metrics=_take_metrics(values), **found)


def _take(values: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values.get(name), kind):
        raise ConfigError(f"{name} is missing or not of type {kind.__name__}")
    return values[name]


def _take_metrics(values: dict[str, Any]) -> Metrics:
    metrics: Metrics = _take(values, "metrics", dict)
    for name, value in metrics.items():
        number: object = value
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ConfigError(f"metrics: {name} is not a number")
    return metrics


def _medians(runs: Sequence[Metrics]) -> Metrics:
    names = dict.fromkeys(name for run in runs for name in run)
    found: Metrics = {}
    for name in names:
        values = [value for run in runs if (value := run.get(name)) is not None]
        finite = [value for value in values if math.isfinite(value)]
        found[name] = statistics.median(finite) if finite else None
    return found


def _finite(metrics: Metrics) -> Metrics:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in metrics.items()
    }


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
