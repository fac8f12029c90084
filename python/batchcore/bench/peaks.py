"""The roofs of a roofline: how fast this machine reads memory and multiplies, as measured here.

The measurement runs in a process of its own, because BLAS libraries take their number of threads
from the environment when they are loaded. It should have the machine for itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from batchcore.errors import BatchcoreError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchcore.bench.model_cost import ModelCost

__all__ = ["Peaks", "measure_peaks"]

_MIN_ARRAY_BYTES = 256 << 20
_CACHES_PER_ARRAY = 4
_MIN_PRODUCT_S = 0.02
_MAX_WIDTH = 4096
_TIMEOUT_S = 120.0
_BLAS_THREADS = (
    "BLIS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a machine can do at most."""

    bytes_per_s: float
    """Reading memory."""
    flops_per_s: float
    """Multiplying matrices; a multiplication and an addition are two operations."""
    num_threads: int
    flops_source: Literal["float32 matmul", "llama.cpp prefill"] = "float32 matmul"
    """What `flops_per_s` was measured with."""

    @property
    def ridge_flops_per_byte(self) -> float:
        """Operations per byte above which a computation can't be bound by memory."""
        return self.flops_per_s / self.bytes_per_s

    def with_prefill(
        self, cost: ModelCost, tokens_per_s: float, *, context_tokens: float = 0
    ) -> Peaks:
        """Take the compute peak from a prefill that was measured with llama.cpp.

        That is what its kernels reach with a model's weights as they are quantised, which may be
        more than float32 on the same machine, where they compute in 8-bit integers, or less.

        Args:
            cost: Of the model.
            tokens_per_s: Prompt tokens per second in calls of about a hundred tokens or more.
            context_tokens: Tokens that a prompt token attended to, on average.

        Raises:
            ConfigError: `tokens_per_s` is not above 0.
        """
        if not tokens_per_s > 0:
            raise ConfigError(f"tokens_per_s must be above 0, not {tokens_per_s}")
        flops_per_token = cost.step_flops(1, 0, context_tokens)
        return replace(
            self, flops_per_s=flops_per_token * tokens_per_s, flops_source="llama.cpp prefill"
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "ridge_flops_per_byte": self.ridge_flops_per_byte}


def measure_peaks(num_threads: int | None = None, *, seconds: float = 0.5) -> Peaks:
    """Measure both peaks with numpy; takes a second or two and some hundred MiB.

    Memory: the threads look for the maximum of arrays of int32 that are several times as large as
    the last level of cache. Compute: float32 matrix products. The best of several counts.

    Args:
        num_threads: As many as the engine has; None means one per usable core.
        seconds: How long to repeat each of the two.

    Raises:
        ConfigError: A value is not above 0.
        BatchcoreError: The measuring process failed.
    """
    num_threads = len(_usable_cpus()) if num_threads is None else num_threads
    if num_threads < 1 or not seconds > 0:
        raise ConfigError(
            f"peaks need threads and time above 0, not {num_threads} threads for {seconds} s"
        )
    command = [sys.executable, "-m", "batchcore.bench.peaks", str(num_threads), str(seconds)]
    env = {**os.environ, **dict.fromkeys(_BLAS_THREADS, str(num_threads))}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit status {error.returncode}"
        raise BatchcoreError(f"measuring the peaks failed: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BatchcoreError(f"measuring the peaks failed: {error}") from error
    bytes_per_s, flops_per_s = json.loads(done.stdout)
    return Peaks(bytes_per_s, flops_per_s, num_threads)


def _read_bytes_per_s(num_threads: int, seconds: float) -> float:
    total_bytes = max(_MIN_ARRAY_BYTES, _CACHES_PER_ARRAY * _last_level_cache_bytes())
    num_elements = total_bytes // num_threads // np.dtype(np.int32).itemsize
    with ThreadPoolExecutor(num_threads) as pool:
        # Made by the threads, so that each has its part in the memory next to it.
        parts = list(pool.map(lambda i: np.full(num_elements, i, np.int32), range(num_threads)))
        return sum(part.nbytes for part in parts) / _best_seconds(
            lambda: list(pool.map(np.max, parts)), seconds
        )


def _product_flops_per_s(seconds: float) -> float:
    rng = np.random.default_rng(0)
    width = 512
    while True:
        a = rng.random((width, width), np.float32)
        b = rng.random((width, width), np.float32)
        out = np.empty_like(a)

        def multiply(a: Any = a, b: Any = b, out: Any = out) -> None:
            np.matmul(a, b, out=out)

        # Too small a product would measure how threads start and end.
        if 2 * width > _MAX_WIDTH or _best_seconds(multiply, 0) >= _MIN_PRODUCT_S:
            return 2 * float(width) ** 3 / _best_seconds(multiply, seconds)
        width *= 2


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    """The shortest of at least two runs, the first of which only warms up."""
    call()
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _last_level_cache_bytes() -> int:
    """All caches of the last level that usable cores have; 0 where the system doesn't say."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in _usable_cpus():
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            level, size = _read(index / "level"), _read(index / "size")
            if level.isdecimal() and size[:-1].isdecimal() and size.endswith("K"):
                caches[int(level), _read(index / "shared_cpu_list")] = int(size[:-1]) << 10
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


if __name__ == "__main__":
    threads, budget_s = int(sys.argv[1]), float(sys.argv[2])
    figures = _read_bytes_per_s(threads, budget_s), _product_flops_per_s(budget_s)
    sys.stdout.write(json.dumps(figures))
