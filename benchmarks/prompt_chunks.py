"""What a long prompt takes in chunks of different sizes.

Each size has a sequence of its own. Whose prompt is least far makes the next call, so that all of
them go through the same prompt, and the same moods of the machine, side by side.

    python benchmarks/prompt_chunks.py --tokens 1920
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from batchcore.lowlevel import Batch, Context
from common import models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore import Model

SIZES = (64, 80, 96, 128, 192, 256, 512)


def one_prompt_each(model: Model, num_tokens: int, repeats: int, threads: int) -> dict[int, float]:
    """Seconds of a prompt by size of its chunks, means of the repeats."""
    taken = dict.fromkeys(SIZES, 0.0)
    with Context(
        model,
        n_ctx=len(SIZES) * num_tokens,
        n_seq_max=len(SIZES),
        n_outputs_max=len(SIZES),
        n_threads=threads,
        kv_layout="streams",
    ) as context:
        for _ in range(repeats):
            done = dict.fromkeys(SIZES, 0)
            while (size := min(done, key=lambda one: (done[one], one))) and done[size] < num_tokens:
                seq_id, end = SIZES.index(size), min(done[size] + size, num_tokens)
                batch = Batch()
                for pos in range(done[size], end):
                    token = 100 + (31 * pos + 17 * seq_id) % 9973
                    batch.add(token, pos, [seq_id], logits=pos == end - 1)
                start = time.perf_counter()
                context.decode(batch)
                taken[size] += time.perf_counter() - start
                done[size] = end
            for seq_id in range(len(SIZES)):
                context.seq_rm(seq_id)
    return {size: seconds / repeats for size, seconds in taken.items()}


def main() -> None:
    """Compare, for each model."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--tokens", type=int, default=1920, help="of a prompt")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--threads", type=int, default=0, help="0: the cores that are there")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    for model in models(given):
        seconds = one_prompt_each(model, given.tokens, given.repeats, given.threads)
        best_s = min(seconds.values())
        rows += [
            {
                "model": model.description,
                "tokens per chunk": size,
                "prompt s": prompt_s,
                "of the best": prompt_s / best_s,
            }
            for size, prompt_s in seconds.items()
        ]
    report("A long prompt in chunks", rows)
    write_json(given, rows)


if __name__ == "__main__":
    main()
