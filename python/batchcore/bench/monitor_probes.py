"""What a monitor can read: an engine's counters, this process, and NVIDIA GPUs.

A probe fills some columns at once. Probes are made by the thread that starts a monitor and read by
the monitor's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from batchcore.bench.model_cost import ModelCost
from batchcore.errors import BatchcoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchcore import EngineStats

__all__ = ["Gpus", "HasStats", "Probe", "ReadCost", "engine_probe", "process_probes", "read_cost"]

_ENGINE_COLUMNS = (
    "num_running",
    "num_waiting",
    "num_active_cells",
    "num_cached_cells",
    "step_decode_rows",
    "step_prefill_tokens",
    "num_steps",
    "num_micro_batches",
    "num_rows",
    "num_generated_tokens",
    "decode_s",
)


@dataclass(frozen=True, slots=True)
class Probe:
    """Columns, and the function that reads a value for each of them."""

    columns: tuple[str, ...]
    read: Callable[[], Sequence[float]]


class HasStats(Protocol):
    """An Engine or an AsyncEngine."""

    def stats(self) -> EngineStats:
        """A consistent copy of the counters."""


class ReadCost(Protocol):
    """What calls must read; ModelCost is one."""

    def weight_bytes(self, rows: int = 1, *, outputs: int | None = None) -> float:
        """Of one call with so many rows."""

    def context_bytes(self, context_tokens: float) -> float:
        """Of one sequence with so many tokens."""


# -- the engine -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _SizeCost:
    """Knows the size of a model only."""

    size_bytes: int

    def weight_bytes(self, rows: int = 1, *, outputs: int | None = None) -> float:  # noqa: ARG002
        return self.size_bytes

    def context_bytes(self, context_tokens: float) -> float:  # noqa: ARG002
        return 0


def read_cost(engine: Any) -> tuple[ReadCost | None, str | None]:
    """What the engine's model must read, and what is wrong with that figure, if anything."""
    try:
        model = getattr(engine, "engine", engine).model
    except (AttributeError, BatchcoreError) as error:
        return None, f"the engine has no model: {error}"
    try:
        return ModelCost.from_gguf(model.path), None
    except Exception as error:  # metadata may be of any shape
        return _SizeCost(model.size_bytes), f"counts all tensors for each call, no KV: {error}"


class _ReadBytes:
    """Adds up what an engine's calls must have read since the first sample."""

    def __init__(self, cost: ReadCost) -> None:
        self._cost = cost
        self._last: EngineStats | None = None
        self._total = 0.0

    def add(self, now: EngineStats) -> float:
        last, self._last = self._last, now
        if last is None or (calls := now.num_micro_batches - last.num_micro_batches) <= 0:
            return self._total
        rows = max(1, round((now.num_rows - last.num_rows) / calls))
        # A call that computes logits gives a token at least; chunks of prompts may not need any.
        with_logits = min(calls, max(0, now.num_generated_tokens - last.num_generated_tokens))
        self._total += with_logits * self._cost.weight_bytes(rows)
        self._total += (calls - with_logits) * self._cost.weight_bytes(rows, outputs=0)
        contexts = [s.num_active_cells / s.num_running for s in (last, now) if s.num_running]
        if contexts:
            decode_rows = now.num_decode_rows - last.num_decode_rows
            mean_tokens = sum(contexts) / len(contexts)
            self._total += decode_rows * self._cost.context_bytes(mean_tokens)
        return self._total


def engine_probe(engine: HasStats, cost: ReadCost | None) -> Probe:
    """The counters of an engine and, where the cost is known, the bytes that its calls read."""
    read_bytes = _ReadBytes(cost) if cost else None

    def read() -> list[float]:
        stats = engine.stats()
        values = [getattr(stats, name) for name in _ENGINE_COLUMNS]
        return [*values, read_bytes.add(stats)] if read_bytes else values

    return Probe((*_ENGINE_COLUMNS, "read_bytes") if cost else _ENGINE_COLUMNS, read)


# -- the process ----------------------------------------------------------------------------------


def process_probes() -> tuple[list[Probe], str | None]:
    """Processor time and memory of this process and the system, or why there is nothing."""
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415
    except ImportError:
        return [], "psutil is not installed: pip install 'batchcore[monitor]'"
    process = psutil.Process()

    def first_is_nothing(percent: Callable[[], float]) -> Callable[[], list[float]]:
        # The time since the call before is what psutil averages over, and the first has none.
        calls = iter([math.nan])

        def read() -> list[float]:
            value = percent()
            return [next(calls, value)]

        return read

    return [
        Probe(("process_cpu_percent",), first_is_nothing(process.cpu_percent)),
        Probe(("system_cpu_percent",), first_is_nothing(psutil.cpu_percent)),
        Probe(("process_rss_bytes",), lambda: [process.memory_info().rss]),
    ], None


# -- GPUs -----------------------------------------------------------------------------------------


class Gpus:
    """The NVIDIA GPUs that NVML shows. `close` when done; where there are none, `why_none`."""

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        """Look for them.

        Args:
            indices: Those to read, as NVML counts them; None means all.
        """
        self.names: list[str] = []
        self.probes: list[Probe] = []
        self.why_none: str | None = None
        self.unsupported: dict[str, str] = {}
        """Columns that a GPU doesn't have, and what NVML says."""
        self._nvml: Any = None
        try:
            import pynvml  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
        except ImportError:
            self.why_none = "nvidia-ml-py is not installed: pip install 'batchcore[nvml]'"
            return
        try:
            pynvml.nvmlInit()
        except Exception as error:  # NVML's own, or what loading a broken driver raises
            self.why_none = f"no NVIDIA driver: {error}"
            return
        self._nvml = pynvml
        try:
            self._find(indices)
        except Exception as error:
            self.why_none = f"NVML failed: {error}"
        if not self.probes and self.why_none is None:
            self.why_none = "NVML shows no GPU that can be read"

    def close(self) -> None:
        """Let NVML go."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            nvml.nvmlShutdown()

    def _find(self, indices: Sequence[int] | None) -> None:
        nvml = self._nvml
        if indices is None:
            indices = range(nvml.nvmlDeviceGetCount())
        transfers = []
        for index in indices:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(device)
            self.names.append(name.decode() if isinstance(name, bytes) else name)
            self.probes += [p for p in _gpu_probes(nvml, index, device) if self._works(p)]
            transfer = _transfer_probe(nvml, index, device)
            if self._works(transfer):
                transfers.append(transfer)
        if transfers:
            self.probes.append(_in_turn(transfers))

    def _works(self, probe: Probe) -> bool:
        try:
            probe.read()
        except Exception as error:
            self.unsupported.update(dict.fromkeys(probe.columns, str(error)))
            return False
        return True


def _gpu_probes(nvml: Any, index: int, device: Any) -> list[Probe]:
    def utilisation() -> list[float]:
        rates = nvml.nvmlDeviceGetUtilizationRates(device)
        return [rates.gpu, rates.memory]

    def clock(kind: int) -> Callable[[], list[float]]:
        return lambda: [nvml.nvmlDeviceGetClockInfo(device, kind)]

    prefix = f"gpu{index}"
    return [
        Probe((f"{prefix}_utilisation_percent", f"{prefix}_memory_busy_percent"), utilisation),
        Probe(
            (f"{prefix}_memory_used_bytes",),
            lambda: [nvml.nvmlDeviceGetMemoryInfo(device).used],
        ),
        Probe((f"{prefix}_power_w",), lambda: [nvml.nvmlDeviceGetPowerUsage(device) / 1e3]),
        Probe((f"{prefix}_sm_clock_mhz",), clock(nvml.NVML_CLOCK_SM)),
        Probe((f"{prefix}_memory_clock_mhz",), clock(nvml.NVML_CLOCK_MEM)),
    ]


def _transfer_probe(nvml: Any, index: int, device: Any) -> Probe:
    def read() -> list[float]:
        kinds = (nvml.NVML_PCIE_UTIL_TX_BYTES, nvml.NVML_PCIE_UTIL_RX_BYTES)
        return [1e3 * nvml.nvmlDeviceGetPcieThroughput(device, kind) for kind in kinds]

    return Probe((f"gpu{index}_pcie_tx_bytes_per_s", f"gpu{index}_pcie_rx_bytes_per_s"), read)


def _in_turn(probes: Sequence[Probe]) -> Probe:
    """Read one of several at a time and repeat what the others gave before.

    NVML measures a PCIe rate while the caller waits, 20 ms for each direction.
    """
    values: list[Sequence[float]] = [[math.nan] * len(probe.columns) for probe in probes]
    turn = 0

    def read() -> list[float]:
        nonlocal turn
        current, turn = turn, (turn + 1) % len(probes)
        values[current] = [math.nan] * len(probes[current].columns)  # where reading fails
        values[current] = probes[current].read()
        return [value for each in values for value in each]

    return Probe(tuple(column for probe in probes for column in probe.columns), read)
