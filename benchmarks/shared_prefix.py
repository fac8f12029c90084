"""One long system prompt in front of every request: how much of it is computed more than once?

The same greedy requests run with and without the prefix cache, each with the KV layout that is the
default with it, all of them sent at once.

    python benchmarks/shared_prefix.py
"""

from __future__ import annotations

import time

import batchcore as bc
from common import distinct_prompt, largest_gap_where_parted, models, num_equal, report, write_json
from common import parser as make_parser


def main() -> None:
    """Run both ways on each model."""
    parser = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--shared-tokens", type=int, default=1000)
    parser.add_argument("--own-tokens", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=24)
    options = parser.parse_args()
    params = bc.SamplingParams(
        max_tokens=options.output_tokens, temperature=0, ignore_eos=True, logprobs=5
    )
    rows = []
    for model in models(options):
        system = distinct_prompt(model, 0, options.shared_tokens)
        prompts = [
            system + distinct_prompt(model, seed, options.own_tokens)[1:]
            for seed in range(1, options.requests + 1)
        ]
        reference = None
        for caching in (False, True):
            with bc.Engine(model, max_num_seqs=16, n_ctx=24_576, prefix_caching=caching) as engine:
                start = time.perf_counter()
                outputs = engine.generate(prompts, params, progress=True)
                seconds = time.perf_counter() - start
                stats = engine.stats()
            reference = reference or outputs
            asked = sum(map(len, prompts))
            # Each generated token but the last of a request is a row too.
            computed = (
                stats.num_rows
                - stats.padding.num_filler_rows
                - (stats.num_generated_tokens - options.requests)
            )
            rows.append(
                {
                    "model": model.path.rsplit("/", 1)[-1],
                    "prefix cache": "on" if caching else "off",
                    "prompt tokens": asked,
                    "computed": computed,
                    "share": computed / asked,
                    "equal outputs": num_equal(outputs, reference),
                    "largest gap (nat)": largest_gap_where_parted(outputs, reference),
                    "seconds": seconds,
                }
            )
    report("Shared prefix", rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()
