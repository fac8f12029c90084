"""Decode calls with batchcore's kernels beside the same calls with ggml's.

Both run in one process and take turns, so that a machine that slows down slows both. A call is a
prompt of 16 to 512 tokens, or one token of each of 1 to 64 sequences that hold 64 tokens.

    python benchmarks/kernel_calls.py --json kernel_calls.json
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any, Literal

from batchcore import Model
from batchcore.bench.compare import compare_pairs
from batchcore.lowlevel import Batch, Context
from common import parser as make_parser
from common import report, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT_TOKENS = 64
PROMPTS = (16, 128, 512)
SEQUENCES = (1, 2, 4, 5, 7, 8, 15, 16, 32, 64)
SPARE = max(SEQUENCES)  # the sequence that prompts go to


def add_rows(batch: Batch, seq_id: int, first: int, count: int) -> None:
    """Tokens of one sequence; the last asks for logits."""
    for pos in range(first, first + count):
        token = 100 + (31 * pos + 17 * seq_id) % 9973
        batch.add(token, pos, [seq_id], logits=pos == first + count - 1)


def make_context(model: Model, threads: int, layout: Literal["unified", "streams"]) -> Context:
    """A context in which every sequence holds some tokens."""
    context = Context(
        model,
        n_ctx=(SPARE + 1) * 1024 if layout == "streams" else SPARE * 2 * CONTEXT_TOKENS + 1024,
        n_seq_max=SPARE + 1,
        n_outputs_max=SPARE + 1,
        n_threads=threads,
        kv_layout=layout,
    )
    for seq_id in range(SPARE):
        batch = Batch()
        add_rows(batch, seq_id, 0, CONTEXT_TOKENS)
        context.decode(batch)
    return context


def prefill(context: Context, count: int) -> float:
    """Seconds for a prompt, which is forgotten afterwards."""
    batch = Batch()
    add_rows(batch, SPARE, 0, count)
    start = time.perf_counter()
    context.decode(batch)
    context.logits(-1)
    taken = time.perf_counter() - start
    context.seq_rm(SPARE)
    return taken


def decode(context: Context, count: int) -> float:
    """Seconds for a token of each of so many sequences, which are forgotten afterwards."""
    batch = Batch()
    for seq_id in range(count):
        add_rows(batch, seq_id, CONTEXT_TOKENS, 1)
    start = time.perf_counter()
    context.decode(batch)
    context.logits(-1)
    taken = time.perf_counter() - start
    for seq_id in range(count):
        context.seq_rm(seq_id, CONTEXT_TOKENS)
    return taken


def measure(ours: Context, ggml: Context, pairs: int) -> Iterator[dict[str, Any]]:
    """A row for each call: both times, and how many times as long ggml's kernels took."""
    calls = [("prefill", prefill, n) for n in PROMPTS] + [("decode", decode, n) for n in SEQUENCES]
    for name, call, count in calls:
        times: dict[str, list[float]] = {"ours": [], "ggml": []}
        for number in range(pairs + 1):
            both = [("ours", ours), ("ggml", ggml)]
            for which, context in both if number % 2 else reversed(both):
                taken = call(context, count)
                if number > 0:  # the first only warms up
                    times[which].append(taken)
        ratio = compare_pairs(times["ours"], times["ggml"])
        yield {
            "call": f"{name} {count}",
            "ms": statistics.median(times["ours"]) * 1e3,
            "ms, least": min(times["ours"]) * 1e3,
            "ms of ggml": statistics.median(times["ggml"]) * 1e3,
            "times as long": f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})",
            "rows/s": count / statistics.median(times["ours"]),
        }


def main() -> None:
    """Compare, for each model, number of threads and layout."""
    options = make_parser(__doc__, ["gemma3-270m", "smollm2-135m"])
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument("--threads", type=int, nargs="+", default=[2])
    options.add_argument("--layouts", nargs="+", default=["streams"])
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.model or given.default_models:
        ours, ggml = Model(name), Model(name, kernels="ggml")
        for threads, layout in itertools.product(given.threads, given.layouts):
            with (
                make_context(ours, threads, layout) as first,
                make_context(ggml, threads, layout) as second,
            ):
                found = [
                    {"model": ours.description, "threads": threads, "layout": layout, **row}
                    for row in measure(first, second, given.pairs)
                ]
            report(f"{ours.description}: {ours.kernels} beside ggml", found)
            rows += found
    write_json(given, rows)


if __name__ == "__main__":
    main()
