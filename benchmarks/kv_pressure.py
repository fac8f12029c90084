"""Four times more KV memory asked for than there is: does everything finish, and with what outputs?

The same greedy requests run with room for all of them and with a quarter of it; there once for each
way to preempt. Every request must finish with its full length.

    python benchmarks/kv_pressure.py
"""

from __future__ import annotations

import time

import batchcore as bc
from common import distinct_prompt, largest_gap_where_parted, models, num_equal, report, write_json
from common import parser as make_parser


def main() -> None:
    """Run all variants on each model."""
    parser = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--overcommit", type=float, default=4.0)
    options = parser.parse_args()
    each = options.prompt_tokens + options.output_tokens
    params = bc.SamplingParams(
        max_tokens=options.output_tokens, temperature=0, ignore_eos=True, logprobs=5
    )
    rows = []
    for model in models(options):
        prompts = [
            distinct_prompt(model, seed, options.prompt_tokens) for seed in range(options.requests)
        ]
        wanted = options.requests * each
        reference = None
        for name, n_ctx, preemption in (
            ("room for all", wanted + 256, "auto"),
            ("auto", round(wanted / options.overcommit), "auto"),
            ("recompute", round(wanted / options.overcommit), "recompute"),
            ("save", round(wanted / options.overcommit), "save"),
        ):
            with bc.Engine(
                model,
                max_num_seqs=32,
                n_ctx=n_ctx,
                preemption=preemption,
                check_integrity=True,
            ) as engine:
                start = time.perf_counter()
                outputs = engine.generate(prompts, params, progress=True)
                seconds = time.perf_counter() - start
                stats = engine.stats()
            reference = reference or outputs
            rows.append(
                {
                    "model": model.path.rsplit("/", 1)[-1],
                    "run": name,
                    "cells": stats.num_cells,
                    "asked": wanted,
                    "finished": sum(
                        len(o.outputs[0].token_ids) == options.output_tokens for o in outputs
                    ),
                    "preempted": stats.num_preemptions,
                    "saved": stats.num_saves,
                    "equal outputs": num_equal(outputs, reference),
                    "largest gap (nat)": largest_gap_where_parted(outputs, reference),
                    "seconds": seconds,
                    "tok/s": stats.num_generated_tokens / seconds,
                }
            )
    report("KV memory overcommitted", rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()
