"""What the benchmarks of this folder share: options, tables, JSON, texts."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.environment import describe_environment, describe_model
from batchcore.model import Model
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchcore import RequestOutput


def parser(description: str | None, models: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--model", action="append", help=f"path or preset; default: {' and '.join(models)}"
    )
    made.add_argument("--json", type=Path, help="write all figures here")
    made.set_defaults(default_models=models)
    return made


def models(options: argparse.Namespace) -> Iterable[Model]:
    """The models asked for, one after another."""
    for name in options.model or options.default_models:
        yield Model(name, progress=True)


def distinct_prompt(model: Model, seed: int, num_tokens: int) -> list[int]:
    """Exactly so many tokens of made-up prose that shares no prefix with another seed's."""
    words = "river stone light garden engine paper winter signal market window copper letter"
    rng = random.Random(seed)
    text = f"{seed}. " + " ".join(rng.choice(words.split()) for _ in range(2 * num_tokens))
    return model.tokenize_prompt(text)[:num_tokens]


def num_equal(ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]) -> int:
    """Requests with the same tokens in both runs."""
    pairs = zip(ours, theirs, strict=True)
    return sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs)


def largest_gap_where_parted(
    ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]
) -> float:
    """Nats between the two tokens at the first difference, at most; needs `logprobs` of 2 or more.

    Batches of other shapes round otherwise with quantised weights, so that greedy outputs part
    where two tokens are nearly level. A large gap would be a defect.
    """
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        tokens = zip(a.outputs[0].token_ids, b.outputs[0].token_ids, strict=False)
        for position, (mine, other) in enumerate(tokens):
            if mine == other:
                continue
            for output, against in ((a, other), (b, mine)):
                logprobs = output.outputs[0].logprobs
                assert logprobs is not None
                here = dict(logprobs[position].top)
                sampled = here[output.outputs[0].token_ids[position]]
                gap = sampled - here[against] if against in here else float("inf")
                largest = max(largest, gap)
            break
    return largest


def report(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table, one column per key."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160, soft_wrap=False).print(table)


def write_json(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Write the figures with what they have to be read with."""
    if options.json is None:
        return
    names = options.model or options.default_models
    document = {
        "environment": describe_environment(),
        "models": [describe_model(Model(name)) for name in names],
        "rows": list(rows),
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
