"""Does n-gram speculation pay where text repeats, and does it cost anything where it does not?

Rounds of requests that start together run on two engines in turn, with and without speculation, so
that both see the same machine. `repetitive` prompts say one line of made-up words several times and
are continued greedily; `varied` ones are continued at temperature 1, so that hardly a pair of
tokens comes back. The first round of each batch size is not counted.

    python benchmarks/speculation.py
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING

import batchcore as bc
from common import distinct_prompt, models, num_equal, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchcore import Engine, RequestOutput


def repetitive_prompt(model: bc.Model, seed: int, num_words: int, times: int) -> list[int]:
    """One line of words, said several times."""
    words = "river stone light garden engine paper winter signal market window copper letter"
    rng = random.Random(seed)
    line = " ".join(rng.choice(words.split()) for _ in range(num_words)) + ".\n"
    return model.tokenize_prompt(line * times)


def timed(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[bc.SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Seconds and outputs of one round."""
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    return time.perf_counter() - start, outputs


def compare(
    plain: Engine,
    drafting: Engine,
    text: str,
    batch_size: int,
    rounds: int,
    output_tokens: int,
) -> dict[str, object]:
    """Rounds of one batch size on both engines, who is first in turn."""
    model = plain.model
    ratios, rates, num_same = [], [], 0
    for number in range(-1, rounds):
        if number == 0:
            before = drafting.stats()
        seeds = [1000 * batch_size + 100 * (number + 1) + i for i in range(batch_size)]
        if text == "repetitive":
            prompts = [repetitive_prompt(model, seed, 24, 5) for seed in seeds]
        else:
            prompts = [distinct_prompt(model, seed, 120) for seed in seeds]
        temperature = 0.0 if text == "repetitive" else 1.0
        params = [
            bc.SamplingParams(
                max_tokens=output_tokens, temperature=temperature, seed=seed, ignore_eos=True
            )
            for seed in seeds
        ]
        engines = [plain, drafting] if number % 2 else [drafting, plain]
        results = {engine is drafting: timed(engine, prompts, params) for engine in engines}
        if number < 0:
            continue
        ratios.append(results[False][0] / results[True][0])
        rates.append([batch_size * output_tokens / results[drafts][0] for drafts in (False, True)])
        num_same += num_equal(results[True][1], results[False][1])
    after = drafting.stats()
    num_drafts = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    num_tokens = rounds * batch_size * output_tokens
    return {
        "text": text,
        "batch": batch_size,
        "tok/s without": statistics.median(rate for rate, _ in rates),
        "tok/s with": statistics.median(rate for _, rate in rates),
        "speedup": statistics.median(ratios),
        "range": f"{min(ratios):.2f} - {max(ratios):.2f}",
        "drafts per token": num_drafts / num_tokens,
        "accepted": num_accepted / num_drafts if num_drafts else float("nan"),
        "equal outputs": f"{num_same} of {rounds * batch_size}",
    }


def main() -> None:
    """Run every batch size with both kinds of text on each model."""
    parser = make_parser(__doc__, ["gemma3-270m", "smollm2-135m"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--texts", nargs="+", default=["repetitive", "varied"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=192)
    parser.add_argument("--num-speculative-tokens", type=int, default=7)
    parser.add_argument("--kv-layout", default="unified")
    options = parser.parse_args()
    rows = []
    for model in models(options):
        engines = [
            bc.Engine(
                model,
                max_num_seqs=max(options.batch_sizes),
                n_ctx=512 * max(options.batch_sizes),
                kv_layout=options.kv_layout,
                prefix_caching=False,
                num_speculative_tokens=most,
            )
            for most in (0, options.num_speculative_tokens)
        ]
        with engines[0] as plain, engines[1] as drafting:
            for text in options.texts:
                for size in options.batch_sizes:
                    row = compare(
                        plain, drafting, text, size, options.rounds, options.output_tokens
                    )
                    rows.append({"model": model.path.rsplit("/", 1)[-1], **row})
                    print(row, flush=True)
    report("Speculation", rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()
