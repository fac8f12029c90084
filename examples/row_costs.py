"""What a row costs: time of one decode call by its number of rows, and of prefill by chunk size.

Batching pays because one pass over the weights serves many rows, but not evenly: CPU kernels take
rows in fours, caches have a size, and the KV layout matters. This measures it on your machine:

    python examples/row_costs.py --model gemma3-270m --kv-layout streams --plot row_costs.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.lowlevel import Batch, Context
from batchcore.model import Model
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 20, 24, 28, 31, 32]
CHUNKS = [32, 64, 96, 128, 130, 192, 256, 258, 384, 512]
CONTEXT_TOKENS = 170


@dataclass
class Result:
    """Medians, and what they were measured on."""

    model: str
    kv_layout: str
    n_threads: int
    llama_cpp_commit: str
    repeats: int
    context_tokens: int = CONTEXT_TOKENS
    decode_ms: dict[int, float] = field(default_factory=dict)
    """Milliseconds of one decode call, by number of rows."""
    prefill_tokens_per_s: dict[int, float] = field(default_factory=dict)
    """Prompt tokens per second, by tokens per call."""


def fill(context: Context, tokens: Sequence[int], rows: int) -> None:
    """Give the first `rows` sequences a context of the usual length."""
    context.clear()
    for seq_id in range(rows):
        count = len(tokens)
        batch = Batch.from_arrays(tokens, range(count), [seq_id] * count)
        context.decode(batch)


def decode_seconds(context: Context, rows: int) -> float:
    """Time of one token for each of `rows` sequences, until the logits are there."""
    position = CONTEXT_TOKENS
    batch = Batch.from_arrays([100] * rows, [position] * rows, range(rows), [True] * rows)
    start = time.perf_counter()
    context.decode(batch)
    context.logits_all()
    seconds = time.perf_counter() - start
    for seq_id in range(rows):
        context.seq_rm(seq_id, position)
    return seconds


def prefill_seconds(context: Context, tokens: Sequence[int], chunk: int) -> float:
    """Time per token of a prompt that goes in `chunk` tokens at a time."""
    context.clear()
    start = time.perf_counter()
    for begin in range(0, len(tokens), chunk):
        positions = range(begin, begin + chunk)
        context.decode(Batch.from_arrays(tokens[begin : begin + chunk], positions, [0] * chunk))
    context.logits()
    return (time.perf_counter() - start) / len(tokens)


def measure(model: Model, kv_layout: Any, n_threads: int, repeats: int) -> Result:
    """Run all calls, interleaved over rounds so that a slow moment hits them all alike."""
    text = "The quick brown fox jumps over the lazy dog. " * 200
    tokens = model.tokenize(text)
    per_sequence = 256
    decode_times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    prefill_times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    with Context(
        model,
        n_ctx=per_sequence * max(ROWS),
        n_seq_max=max(ROWS),
        n_outputs_max=max(ROWS),
        n_threads=n_threads,
        kv_layout=kv_layout,
    ) as context:
        n_threads = context.n_threads
        fill(context, tokens[:CONTEXT_TOKENS], max(ROWS))
        for _ in track(range(repeats + 1), "decode", console=Console(stderr=True)):
            for rows in ROWS:
                decode_seconds(context, rows)  # leaves its compute graph for the next one
                decode_times[rows].append(decode_seconds(context, rows))
    n_prompt = 512
    with Context(
        model, n_ctx=2 * n_prompt, n_outputs_max=1, n_threads=n_threads, kv_layout=kv_layout
    ) as context:
        for _ in track(range(max(2, repeats // 3) + 1), "prefill", console=Console(stderr=True)):
            for chunk in CHUNKS:
                prompt = tokens[: n_prompt // chunk * chunk]
                prefill_times[chunk].append(prefill_seconds(context, prompt, chunk))
    return Result(
        model=model.path.rsplit("/", 1)[-1],
        kv_layout=kv_layout,
        n_threads=n_threads,
        llama_cpp_commit=_core.build_info()["llama_cpp_commit"],
        repeats=repeats,
        # The first round only warms up.
        decode_ms={rows: 1e3 * statistics.median(t[1:]) for rows, t in decode_times.items()},
        prefill_tokens_per_s={c: 1 / statistics.median(t[1:]) for c, t in prefill_times.items()},
    )


def show(result: Result) -> None:
    """Print both tables."""
    title = f"{result.model}, {result.kv_layout}, {result.n_threads} threads"
    table = Table("rows", "ms per call", "ms per row", "tok/s", title=f"Decode: {title}")
    for rows, ms in result.decode_ms.items():
        table.add_row(f"{rows}", f"{ms:.1f}", f"{ms / rows:.2f}", f"{1e3 * rows / ms:.0f}")
    for column in table.columns:
        column.justify = "right"
    Console().print(table)
    table = Table("tokens per call", "tok/s", title=f"Prefill: {title}")
    for chunk, speed in result.prefill_tokens_per_s.items():
        table.add_row(f"{chunk}", f"{speed:.0f}")
    for column in table.columns:
        column.justify = "right"
    Console().print(table)


def plot(result: Result, file: Path) -> None:
    """Draw both curves."""
    try:
        import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install 'batchcore[plot]'")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows, ms = list(result.decode_ms), list(result.decode_ms.values())
    fours = [i for i, n in enumerate(rows) if n % 4 == 0]
    left.plot(rows, ms, color="tab:blue", marker="o", markersize=4, label="any number of rows")
    left.plot(
        [rows[i] for i in fours],
        [ms[i] for i in fours],
        linestyle="none",
        color="tab:orange",
        marker="o",
        markersize=7,
        label="multiples of four",
    )
    left.set(xlabel="rows in one decode call", ylabel="milliseconds per call", ylim=(0, None))
    left.set_xticks(range(0, max(rows) + 1, 4))
    left.set_title(f"Decode, context {result.context_tokens} each")
    left.legend(frameon=False)
    chunks = [str(chunk) for chunk in result.prefill_tokens_per_s]
    bars = right.bar(chunks, list(result.prefill_tokens_per_s.values()), color="tab:blue")
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set(xlabel="tokens in one call", ylabel="prompt tokens per second")
    right.set_title("Prefill")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.model}, {result.kv_layout}, {result.n_threads} threads")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="gemma3-270m", help="path, preset or hf:owner/repo/file")
    parser.add_argument("--kv-layout", choices=["unified", "streams"], default="streams")
    parser.add_argument("--threads", type=int, default=0, help="0: the cores that are there")
    parser.add_argument("--repeats", type=int, default=9, help="medians are over this many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (PNG, SVG, PDF)")
    options = parser.parse_args()
    model = Model(options.model, progress=True)
    result = measure(model, options.kv_layout, options.threads, options.repeats)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
