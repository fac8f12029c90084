"""The time that the kernels alone would take for a run, at the best rates of their shapes.

    bound = sum over prompt tokens of p + q * position
          + sum over output tokens of t(n) / n, for n sequences that decode while it is made

p and q are what a token of a prompt costs in the best of several chunks, and what each token before
it adds to that in attention. t(n) is the shortest decode call with n rows or more (a call may be
filled up). Rates are measured with llama.cpp itself, in the same round as the run; occupancy is the
run's own, so the bound says nothing about whether more sequences could have decoded together.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchcore import _core
from batchcore.bench.peers.base import Measurement, Peer
from batchcore.bench.peers.measure import token_times_s
from batchcore.lowlevel import Batch, Context
from batchcore.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchcore.bench.metrics import RequestRecord
    from batchcore.bench.peers.base import Setup
    from batchcore.bench.peers.workloads import Case

__all__ = [
    "NAME",
    "KernelBound",
    "ShapeTable",
    "bound_s",
    "measure_shapes",
    "occupancy",
    "positions",
]

NAME = "kernel-bound"
CONTEXT_TOKENS = 256
"""Of each sequence that decodes: about the mean of `mixed`."""
_ROWS = (1, 2, 4, 8, 12, 16)
_CHUNKS = (64, 128, 256, 512)
_DEPTH = 512
"""Where chunks begin that show what attention adds."""
_REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class ShapeTable:
    """What calls take, in seconds."""

    prefill_s_per_token: float
    """At the beginning of a prompt, in the best of the chunks."""
    attention_s_per_position: float
    """What a token of a prompt costs more for each one before it."""
    decode_s: Mapping[int, float]
    """Of a call in which as many sequences decode."""

    def seconds_per_token(self, rows: int) -> float:
        """The least that a token costs while `rows` sequences decode.

        Between measured numbers of rows a call is taken to cost what a straight line says; beyond
        the largest, each token costs what it does there.
        """
        known = sorted(self.decode_s)
        if rows >= known[-1]:
            return self.decode_s[known[-1]] / known[-1]
        above = bisect_left(known, rows)
        times = [self.decode_s[row] for row in known]
        here = times[above]
        if known[above] != rows and above > 0:
            share = (rows - known[above - 1]) / (known[above] - known[above - 1])
            here = times[above - 1] + share * (times[above] - times[above - 1])
        return min(here, *times[above:]) / rows


def occupancy(records: Iterable[RequestRecord]) -> dict[int, int]:
    """Output tokens by the number of sequences that decoded when they came.

    First tokens are not counted: they come with the last call of a prompt.
    """
    times = [one for record in records if len(one := token_times_s(record)) > 1]
    counts: Counter[int] = Counter()
    for one in times:
        for at in one[1:]:
            counts[sum(other[0] < at <= other[-1] for other in times)] += 1
    return dict(sorted(counts.items()))


def bound_s(
    table: ShapeTable,
    num_prompt_tokens: int,
    sum_of_positions: int,
    tokens_by_rows: Mapping[int, int],
) -> float:
    """Seconds that a run would have taken in the best shapes.

    Args:
        table: Measured near the run.
        num_prompt_tokens: Those that were computed.
        sum_of_positions: Of these tokens; see `positions`.
        tokens_by_rows: See `occupancy`.
    """
    decode = sum(count * table.seconds_per_token(rows) for rows, count in tokens_by_rows.items())
    prefill = num_prompt_tokens * table.prefill_s_per_token
    return prefill + sum_of_positions * table.attention_s_per_position + decode


def positions(records: Iterable[RequestRecord]) -> int:
    """Sum over all prompt tokens that were computed, of how many come before each."""
    return sum(sum(range(record.num_cached_tokens, record.num_prompt_tokens)) for record in records)


def measure_shapes(
    model: Model,
    n_threads: int,
    *,
    rows: Sequence[int] = _ROWS,
    chunks: Sequence[int] = _CHUNKS,
    context_tokens: int = CONTEXT_TOKENS,
    depth: int = _DEPTH,
    repetitions: int = _REPETITIONS,
) -> ShapeTable:
    """Time calls of llama.cpp in the layout that is fastest on a CPU, a stream per sequence."""
    most = max(rows)
    with Context(
        model,
        n_ctx=(most + 2) * (max(context_tokens, depth) + max(256, *chunks)),
        n_seq_max=most + 2,
        n_ubatch=max(*chunks, most),
        n_outputs_max=most + 2,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        kv_layout="streams",
    ) as context:
        for seq_id in range(most):
            context.decode(_prompt(seq_id, context_tokens))
        deep = most + 1
        context.decode(_prompt(deep, depth))
        prefill: dict[int, list[float]] = {chunk: [] for chunk in chunks}
        added: list[float] = []
        decode: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(repetitions):
            for chunk in chunks:
                first_s = _time(context, _prompt(most, chunk))
                context.seq_rm(most)
                deep_s = _time(context, _prompt(deep, chunk, depth))
                context.seq_rm(deep, depth)
                prefill[chunk].append(first_s / chunk)
                added.append((deep_s - first_s) / (chunk * depth))
            for count in rows:
                batch = Batch()
                for seq_id in range(count):
                    batch.add(1 + seq_id, context_tokens, [seq_id], logits=True)
                decode[count].append(_time(context, batch))
                for seq_id in range(count):
                    context.seq_rm(seq_id, context_tokens)
    per_token = {chunk: statistics.median(times) for chunk, times in prefill.items()}
    # Noise in small models must not leave less than half of a chunk's time for all the rest.
    limit = min(per_token.values()) / max(chunks)
    attention_s = min(max(statistics.median(added), 0.0), limit)
    return ShapeTable(
        min(time - attention_s * (chunk - 1) / 2 for chunk, time in per_token.items()),
        attention_s,
        {count: statistics.median(times) for count, times in decode.items()},
    )


class KernelBound(Peer):
    """Not a program: the rates of the shapes, measured in turn with the peers."""

    name = NAME
    warms_up = False

    def __init__(self) -> None:
        """Nothing is needed."""
        self.version = _core.build_info()["llama_cpp_commit"]
        self._setup: Setup | None = None

    def why_not(self, case: Case) -> str | None:
        """The context that is assumed is that of one workload."""
        return None if case.name == "mixed" else "is defined for mixed"

    def start(self, setup: Setup) -> None:
        """Remember what is measured."""
        self._setup = setup

    def run(self, case: Case) -> Measurement:
        """Measure; the bound follows when batchcore has run, too."""
        del case
        assert self._setup is not None
        table = measure_shapes(Model(self._setup.model), self._setup.n_threads)
        metrics: dict[str, float | None] = {
            "prefill_tokens_per_s": 1 / table.prefill_s_per_token,
            "total_s": None,
        }
        return Measurement(
            metrics,
            {
                "attention_s_per_position": table.attention_s_per_position,
                "decode_s": {str(n): t for n, t in table.decode_s.items()},
            },
        )

    def stop(self) -> None:
        """Nothing is left."""


def _prompt(seq_id: int, count: int, first: int = 0) -> Batch:
    # Any tokens do; the last asks for logits, as that of a prompt does.
    wanted = [False] * (count - 1) + [True]
    return Batch.from_arrays(
        [1 + i % 97 for i in range(count)], range(first, first + count), [seq_id] * count, wanted
    )


def _time(context: Context, batch: Batch) -> float:
    start = time.perf_counter()
    context.decode(batch)
    return time.perf_counter() - start
