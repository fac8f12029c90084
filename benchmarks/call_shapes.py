"""Which calls of llama.cpp compute the same rows faster: measured in pairs.

16 sequences have 250 tokens each. The same work is done in two ways, who is first in turn, and the
ratio is taken within each pair:

* rows that decode and tokens of a prompt in one call, against one call for each;
* one KV pool for all sequences (`unified`) against a stream of cells for each (`streams`);
* few sequences in adjacent slots, against the same with slots between them, where dummy rows bridge
  the gaps or llama.cpp cuts the call;
* several prompts in one call, against a call for each;
* a prefix of 1,000 tokens computed, against copied from another stream.

    python benchmarks/call_shapes.py --json call_shapes.json
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchcore.bench.compare import compare_pairs
from batchcore.lowlevel import Batch, Context
from common import models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchcore import Model

Layout = Literal["unified", "streams"]

CONTEXT_TOKENS = 250
DECODING = range(16)
SPARE = range(16, 22)
"""Sequences that prompts of a comparison go to; empty before and after."""
PREFIX_TOKENS = 1000


@dataclass(frozen=True)
class Rows:
    """Tokens of one sequence in a call."""

    seq_id: int
    first_pos: int
    count: int = 1


@dataclass(frozen=True)
class Way:
    """Calls that do some work, one after another."""

    name: str
    layout: Layout
    calls: tuple[tuple[Rows, ...], ...]
    copied_tokens: int = 0
    """Of the first spare sequence, to the next before the calls."""


def decode(slots: Iterable[int]) -> tuple[Rows, ...]:
    """A token of each of these sequences."""
    return tuple(Rows(seq_id, CONTEXT_TOKENS) for seq_id in slots)


def prompt(count: int, seq_id: int = SPARE[0], first_pos: int = 0) -> tuple[Rows, ...]:
    """So many tokens of a prompt."""
    return (Rows(seq_id, first_pos, count),)


def joint(num_rows: int, num_tokens: int) -> tuple[Way, Way]:
    """One call, and two."""
    rows, tokens = decode(DECODING[:num_rows]), prompt(num_tokens)
    what = f"{num_rows} decode + {num_tokens} prompt"
    return (
        Way(f"{what}, one call", "unified", (rows + tokens,)),
        Way(f"{what}, two calls", "unified", (rows, tokens)),
    )


def layouts(what: str, rows: tuple[Rows, ...]) -> tuple[Way, Way]:
    """The same call in both layouts."""
    return Way(f"{what}, unified", "unified", (rows,)), Way(f"{what}, streams", "streams", (rows,))


def gaps(count: int, *, bridged: bool) -> tuple[Way, Way]:
    """Sequences far apart, and side by side."""
    step = len(DECODING) // count
    apart = DECODING[:: 1 if bridged else step]
    how = (
        f"dummy rows in {step - 1} slots between" if bridged else f"cut by {step - 1} slots between"
    )
    return (
        Way(f"{count} decode, {how}", "streams", (decode(apart),)),
        Way(f"{count} decode, adjacent", "streams", (decode(DECODING[:count]),)),
    )


def prompts(count: int) -> tuple[Way, Way]:
    """Several prompts in one call, and in a call each."""
    each = [prompt(count, seq_id) for seq_id in SPARE]
    what = f"{len(SPARE)} prompts of {count}"
    return (
        Way(f"{what}, one call", "streams", (tuple(rows for call in each for rows in call),)),
        Way(f"{what}, a call each", "streams", tuple(each)),
    )


def prefix() -> tuple[Way, Way]:
    """Computed in chunks, and copied; then one more token, as a copy is made with the next call."""
    chunks = tuple(
        prompt(250, SPARE[1], first) for first in range(0, PREFIX_TOKENS, CONTEXT_TOKENS)
    )
    last = (prompt(1, SPARE[1], PREFIX_TOKENS),)
    what = f"a prefix of {PREFIX_TOKENS}"
    return (
        Way(f"{what}, computed", "streams", chunks + last),
        Way(f"{what}, copied", "streams", last, copied_tokens=PREFIX_TOKENS),
    )


COMPARISONS = (
    joint(16, 16),
    joint(16, 48),
    joint(16, 128),
    layouts("16 decode", decode(DECODING)),
    layouts("128 prompt", prompt(128)),
    gaps(4, bridged=True),
    gaps(4, bridged=False),
    gaps(8, bridged=False),
    prompts(16),
    prompts(60),
    prefix(),
)


def make_context(model: Model, layout: Layout, threads: int) -> Context:
    """A context in which sequences are ready to decode."""
    num_sequences = len(DECODING) + len(SPARE)
    context = Context(
        model,
        n_ctx=num_sequences * 1024,
        n_seq_max=num_sequences,
        n_outputs_max=num_sequences,
        n_threads=threads,
        kv_layout=layout,
    )
    for seq_id in DECODING:
        run(context, prompt(CONTEXT_TOKENS, seq_id))
    return context


def run(context: Context, call: Sequence[Rows]) -> None:
    """One call; the last token of each sequence asks for logits, as one that decodes does."""
    batch = Batch()
    for rows in call:
        positions = range(rows.first_pos, rows.first_pos + rows.count)
        for pos in positions:
            token = 100 + (31 * pos + 17 * rows.seq_id) % 9973
            batch.add(token, pos, [rows.seq_id], logits=pos == positions[-1])
    context.decode(batch)


def seconds(context: Context, way: Way) -> float:
    """Do the work, and undo it."""
    if way.copied_tokens:
        for first in range(0, way.copied_tokens, CONTEXT_TOKENS):
            run(context, prompt(CONTEXT_TOKENS, SPARE[0], first))
    start = time.perf_counter()
    if way.copied_tokens:
        context.seq_cp(SPARE[0], SPARE[1])
    for call in way.calls:
        run(context, call)
    taken = time.perf_counter() - start
    for seq_id in DECODING:
        context.seq_rm(seq_id, CONTEXT_TOKENS)
    for seq_id in SPARE:
        context.seq_rm(seq_id)
    return taken


def describe(
    model: Model, ways: tuple[Way, Way], times: dict[Way, list[float]]
) -> list[dict[str, Any]]:
    """A row for each way; the second has how many times as long it took."""
    ratio = compare_pairs(*times.values())
    found = ["", f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"]
    return [
        {
            "model": model.description,
            "calls": way.name,
            "ms": statistics.median(times[way]) * 1e3,
            "ratio": text,
        }
        for way, text in zip(ways, found, strict=True)
    ]


def main() -> None:
    """Compare, for each model."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--pairs", type=int, default=7)
    options.add_argument("--threads", type=int, default=0, help="0: the cores that are there")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    for model in models(given):
        with (
            make_context(model, "unified", given.threads) as unified,
            make_context(model, "streams", given.threads) as streams,
        ):
            contexts = {"unified": unified, "streams": streams}
            for ways in COMPARISONS:
                times: dict[Way, list[float]] = {way: [] for way in ways}
                for number in range(given.pairs + 1):
                    for way in ways if number % 2 else reversed(ways):
                        taken = seconds(contexts[way.layout], way)
                        if number > 0:  # the first only warms up
                            times[way].append(taken)
                rows += describe(model, ways, times)
    report("Calls that do the same work", rows)
    write_json(given, rows)


if __name__ == "__main__":
    main()
