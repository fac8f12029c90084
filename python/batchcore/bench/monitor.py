"""Watching a run: utilisation, power and memory of the hardware next to the engine's counters.

```python
from batchcore.bench.monitor import Monitor

with Monitor(engine) as monitor:
    engine.generate(prompts)
result = monitor.result()
print(result.summary["process_cpu_percent"].mean, result.summary["read_bytes_per_s"].mean)
```

A thread takes samples at a fixed rate. What can't be read is left out, and what fails on the way is
counted: watching never ends a run.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from batchcore.bench.monitor_probes import Gpus, Probe, engine_probe, process_probes, read_cost
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from typing_extensions import Self

    from batchcore.bench.monitor_probes import HasStats, ReadCost

    Column = npt.NDArray[np.float64]

__all__ = ["ColumnSummary", "Monitor", "MonitorResult"]

# Columns that are made from two others: how much the first grew, over how much the second did.
_RATES = {
    "generated_tokens_per_s": ("num_generated_tokens", "time_s"),
    "read_bytes_per_s": ("read_bytes", "time_s"),
    "decode_read_bytes_per_s": ("read_bytes", "decode_s"),
}
_JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """One column in a few numbers; None where it has no value at all."""

    mean: float | None
    """Over time: each value counts for the time since the sample before, so that the mean of a rate
    is the whole growth over the whole time."""
    max: float | None
    change: float | None
    """The last value minus the first: what a counter counted."""


@dataclass(frozen=True, slots=True)
class MonitorResult:
    """Samples by column. Every column has one value per sample, NaN where there is none."""

    columns: Mapping[str, Column]
    """`time_s` are seconds since `start_s`; docs/monitoring.md lists the others."""
    start_s: float
    """When it started, on the clock of `time.perf_counter`."""
    interval_s: float
    """Asked for."""
    gpus: Sequence[str]
    """Names of the GPUs that were read."""
    missing: Mapping[str, str]
    """Groups of columns, or columns, that could not be read, and why."""
    errors: Mapping[str, int]
    """How often reading failed, by the first column of what was read."""
    first_errors: Mapping[str, str]
    """What it said when it first failed."""

    def __len__(self) -> int:
        """Samples taken."""
        return len(self.columns["time_s"])

    def __getitem__(self, column: str) -> Column:
        """A column by its name."""
        return self.columns[column]

    @property
    def duration_s(self) -> float:
        """From the first sample to the last."""
        times_s = self.columns["time_s"]
        return float(times_s[-1] - times_s[0]) if len(times_s) else 0.0

    @property
    def max_gap_s(self) -> float:
        """The longest time between two samples."""
        return float(np.diff(self.columns["time_s"]).max(initial=0))

    @property
    def summary(self) -> dict[str, ColumnSummary]:
        """Mean, maximum and change of every column but the time."""
        columns = self.columns
        over = {name: _RATES.get(name, ("", "time_s"))[1] for name in columns if name != "time_s"}
        return {
            name: _summarise(columns[name], _growth(columns[time])) for name, time in over.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; None where there is no value."""
        return {
            "start_s": self.start_s,
            "interval_s": self.interval_s,
            "num_samples": len(self),
            "duration_s": self.duration_s,
            "max_gap_s": self.max_gap_s,
            "gpus": list(self.gpus),
            "missing": dict(self.missing),
            "errors": dict(self.errors),
            "first_errors": dict(self.first_errors),
            "summary": {name: asdict(column) for name, column in self.summary.items()},
            "columns": {
                name: [None if math.isnan(value) else value for value in values.tolist()]
                for name, values in self.columns.items()
            },
        }


class Monitor:
    """Samples hardware and engine in a thread of its own. A context manager, good for one run."""

    def __init__(
        self,
        engine: HasStats | None = None,
        *,
        interval_s: float = 0.1,
        cost: ReadCost | None = None,
        gpus: Sequence[int] | None = None,
    ) -> None:
        """Say what to watch; sampling starts with `with` or `start`.

        Args:
            engine: An Engine or AsyncEngine whose counters to record; None means the hardware only.
            interval_s: Time between samples. A sample takes well under a millisecond, with GPUs up
                to 50.
            cost: What the engine's calls must read, e.g. with KV types other than f16; None means
                that the engine's file is read for it.
            gpus: Which to read, as NVML counts them; None means all.

        Raises:
            ConfigError: `interval_s` is not above 0.
        """
        if not 0 < interval_s < math.inf:
            raise ConfigError(f"interval_s must be above 0, not {interval_s}")
        self.interval_s = interval_s
        """Time between samples."""
        self.missing: dict[str, str] = {}
        """What can't be read here, and why; known once it has started."""
        self._engine = engine
        self._cost = cost
        self._gpu_indices = gpus
        self._gpus: Gpus | None = None
        self._probes: list[Probe] = []
        self._columns: dict[str, array[float]] = {"time_s": array("d")}
        self._errors: dict[str, int] = {}
        self._first_errors: dict[str, str] = {}
        self._lock = threading.Lock()  # guards columns and errors
        self._start_s = 0.0
        self._has_sample = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def why_no_gpu(self) -> str | None:
        """Why no GPU is read; None where one is, or before the start."""
        return self.missing.get("gpu")

    def start(self) -> None:
        """Find out what can be read and take the first sample.

        Raises:
            ConfigError: It was started before.
        """
        if self._thread is not None:
            raise ConfigError("a monitor is good for one run: make another one")
        self._find_probes()
        for probe in self._probes:
            self._columns.update((column, array("d")) for column in probe.columns)
        self._start_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="batchcore-monitor", daemon=True)
        self._thread.start()
        self._has_sample.wait(_JOIN_TIMEOUT_S)

    def stop(self) -> MonitorResult:
        """Take the last sample and end the thread; calling it again only returns the result."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)  # bounded: a driver may hang
        return self.result()

    def result(self) -> MonitorResult:
        """The samples so far."""
        with self._lock:
            columns = {name: np.array(values) for name, values in self._columns.items()}
            errors, first_errors = dict(self._errors), dict(self._first_errors)
        return MonitorResult(
            columns=_with_rates(columns),
            start_s=self._start_s,
            interval_s=self.interval_s,
            gpus=self._gpus.names if self._gpus else [],
            missing=dict(self.missing),
            errors=errors,
            first_errors=first_errors,
        )

    def _find_probes(self) -> None:
        if self._engine is not None:
            cost, problem = (self._cost, None) if self._cost else read_cost(self._engine)
            if problem:
                self.missing["read_bytes"] = problem
            self._probes.append(engine_probe(self._engine, cost))
        probes, problem = process_probes()
        self._probes += probes
        if problem:
            self.missing["process"] = problem
        self._gpus = Gpus(self._gpu_indices)
        self._probes += self._gpus.probes
        if self._gpus.why_none:
            self.missing["gpu"] = self._gpus.why_none
        self.missing.update(self._gpus.unsupported)

    def _run(self) -> None:
        next_s = self._start_s
        while True:
            self._sample()
            self._has_sample.set()
            # Where a sample took too long, the next one is late and none is made up for.
            next_s = max(next_s + self.interval_s, time.perf_counter())
            if self._stopping.wait(next_s - time.perf_counter()):
                break
        self._sample()
        if self._gpus:
            try:
                self._gpus.close()
            except Exception as error:
                self._count("gpu", error)

    def _sample(self) -> None:
        sample = {"time_s": time.perf_counter() - self._start_s}
        for probe in self._probes:
            sample.update(self._read(probe))
        with self._lock:
            for name, values in self._columns.items():
                values.append(sample.get(name, math.nan))

    def _read(self, probe: Probe) -> dict[str, float]:
        try:
            return dict(zip(probe.columns, map(float, probe.read()), strict=True))
        except Exception as error:
            self._count(probe.columns[0], error)
            return {}

    def _count(self, what: str, error: Exception) -> None:
        with self._lock:
            self._errors[what] = self._errors.get(what, 0) + 1
            self._first_errors.setdefault(what, f"{type(error).__name__}: {error}")


def _growth(values: Column) -> Column:
    """Since the sample before; NaN where there is none."""
    return np.diff(values, prepend=math.nan)


def _with_rates(columns: dict[str, Column]) -> dict[str, Column]:
    rates = {}
    for rate, (counter, over) in _RATES.items():
        if counter in columns:
            growth, time_s = _growth(columns[counter]), _growth(columns[over])
            nothing = np.full_like(growth, math.nan)
            rates[rate] = np.divide(growth, time_s, where=time_s > 0, out=nothing)
    return columns | rates


def _summarise(values: Column, weights: Column) -> ColumnSummary:
    there = ~np.isnan(values)
    values, weights = values[there], np.nan_to_num(weights[there])
    if not len(values):
        return ColumnSummary(mean=None, max=None, change=None)
    mean = np.average(values, weights=weights) if weights.sum() > 0 else values.mean()
    return ColumnSummary(
        mean=float(mean), max=float(values.max()), change=float(values[-1] - values[0])
    )
