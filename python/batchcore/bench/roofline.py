"""Roofline: what a step must read and compute, against what the machine can do at most.

A decode step reads all weights for however many rows it has, so few rows leave the arithmetic units
idle: the step is memory-bound, and another row is nearly free. From some number of rows on it is
compute-bound, and a larger batch only makes each of them slower. Neither holds where most of a step
goes into something else: small kernels, threads that wait, sampling.

```python
from batchcore.bench.roofline import ModelCost, Roofline, measure_peaks

roofline = Roofline(ModelCost.from_gguf("model.gguf"), measure_peaks(num_threads=2))
print(roofline.classify(rows=16, seconds_per_step=0.067, context_tokens=170).explanation)
```

After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchcore.bench.model_cost import AttentionLayer, ModelCost
from batchcore.bench.peaks import Peaks, measure_peaks
from batchcore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    Verdict = Literal["memory-bound", "compute-bound", "neither (overhead)"]

__all__ = [
    "AttentionLayer",
    "ModelCost",
    "Peaks",
    "Roofline",
    "RooflinePoint",
    "measure_peaks",
]

_ABOVE_PEAK = 1.05  # measurements of the same thing differ by this much


@dataclass(frozen=True, slots=True)
class RooflinePoint:
    """Where a measured step stands under the roofline."""

    rows: int
    outputs: int
    """Rows that asked for logits."""
    context_tokens: float
    seconds_per_step: float
    """As measured."""
    step_bytes: float
    """What it must read."""
    step_flops: float
    """What it must compute."""
    intensity_flops_per_byte: float
    ridge_flops_per_byte: float
    """The intensity above which memory can't be what bounds it."""
    memory_s: float
    """How long it takes at least, by the memory peak,"""
    compute_s: float
    """and by the compute peak."""
    memory_fraction: float
    """Of the memory peak, what the step reached;"""
    compute_fraction: float
    """of the compute peak."""
    verdict: Verdict
    explanation: str
    """The verdict in one or two sentences, with the figures."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a machine."""

    cost: ModelCost
    peaks: Peaks

    def step_seconds(
        self,
        rows: int,
        context_tokens: float = 0,
        *,
        outputs: int | None = None,
        sequences: int | None = None,
    ) -> float:
        """How long a step takes at least: the longer of reading and computing."""
        num_bytes = self.cost.step_bytes(rows, context_tokens, outputs=outputs, sequences=sequences)
        flops = self.cost.step_flops(rows, outputs, context_tokens)
        return max(num_bytes / self.peaks.bytes_per_s, flops / self.peaks.flops_per_s)

    def ridge_rows(self, context_tokens: float = 0, *, max_rows: int = 4096) -> int | None:
        """The fewest rows of decode that are above the ridge point.

        None where `max_rows` are not enough: with long contexts the KV cells of each row may keep
        the intensity below the ridge for ever.
        """
        ridge = self.peaks.ridge_flops_per_byte
        return next(
            (n for n in range(1, max_rows + 1) if self.cost.intensity(n, context_tokens) >= ridge),
            None,
        )

    def classify(
        self,
        rows: int,
        seconds_per_step: float,
        *,
        context_tokens: float = 0,
        outputs: int | None = None,
        sequences: int | None = None,
        threshold: float = 0.5,
    ) -> RooflinePoint:
        """Say what bounds a step that was measured.

        Args:
            rows: Tokens in the step's call.
            seconds_per_step: Measured; best the time inside llama.cpp per call.
            context_tokens: Tokens that a row attends to, on average.
            outputs: Rows that ask for logits; None means all of them.
            sequences: Sequences that the rows belong to; None means one each, as in decode.
            threshold: What share of a peak must be reached to be called bound by it.

        Raises:
            ConfigError: A value is out of range.
        """
        if not seconds_per_step > 0:
            raise ConfigError(f"seconds_per_step must be above 0, not {seconds_per_step}")
        num_bytes = self.cost.step_bytes(rows, context_tokens, outputs=outputs, sequences=sequences)
        flops = self.cost.step_flops(rows, outputs, context_tokens)
        memory_s, compute_s = num_bytes / self.peaks.bytes_per_s, flops / self.peaks.flops_per_s
        verdict: Verdict = "neither (overhead)"
        if max(memory_s, compute_s) >= threshold * seconds_per_step:
            verdict = "memory-bound" if memory_s >= compute_s else "compute-bound"
        figures: dict[str, Any] = {
            "rows": rows,
            "seconds_per_step": seconds_per_step,
            "step_bytes": num_bytes,
            "step_flops": flops,
            "intensity_flops_per_byte": flops / num_bytes,
            "ridge_flops_per_byte": self.peaks.ridge_flops_per_byte,
            "memory_s": memory_s,
            "compute_s": compute_s,
            "memory_fraction": memory_s / seconds_per_step,
            "compute_fraction": compute_s / seconds_per_step,
        }
        return RooflinePoint(
            **figures,
            outputs=rows if outputs is None else outputs,
            context_tokens=context_tokens,
            verdict=verdict,
            explanation=" ".join(_sentences(verdict, self.peaks, threshold, **figures)),
        )


def _sentences(verdict: Verdict, peaks: Peaks, threshold: float, **figures: Any) -> Iterable[str]:
    intensity, ridge = figures["intensity_flops_per_byte"], figures["ridge_flops_per_byte"]
    yield (
        f"{verdict}: {_count(figures['rows'], 'row')} must read "
        f"{figures['step_bytes'] / 1e6:.4g} MB and compute {figures['step_flops'] / 1e9:.3g} "
        f"GFLOP, {intensity:.3g} operations per byte, "
        f"{'below' if intensity < ridge else 'above'} the ridge point of {ridge:.3g}."
    )
    memory = (
        f"{100 * figures['memory_fraction']:.0f} % of the memory peak "
        f"({peaks.bytes_per_s / 1e9:.3g} GB/s)"
    )
    compute = (
        f"{100 * figures['compute_fraction']:.0f} % of the compute peak "
        f"({peaks.flops_per_s / 1e9:.3g} GFLOP/s, {peaks.flops_source})"
    )
    yield f"Its {1e3 * figures['seconds_per_step']:.4g} ms are {memory} and {compute}."
    if verdict == "neither (overhead)":
        yield f"Less than {100 * threshold:.0f} % of either: most of the step is something else."
    if figures["memory_fraction"] > _ABOVE_PEAK:
        yield "Above the memory peak: part of the weights stays in the cache."
    if figures["compute_fraction"] > _ABOVE_PEAK:
        yield "Above the compute peak: these kernels are faster than those it was measured with."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
