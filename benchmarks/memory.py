"""What the engine takes beyond llama.cpp: peak memory of a process with each.

Three child processes: one that only imports batchcore, one that runs llama.cpp's context by hand
(`batchcore.lowlevel`), one that runs the engine; same model, cells, micro-batch and tokens, so that
weights, KV cells and llama.cpp's buffers are touched alike.

    python benchmarks/memory.py --json memory.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from batchcore import Engine, SamplingParams
from batchcore.lowlevel import Batch, Context
from batchcore.model import Model
from common import distinct_prompt, models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from collections.abc import Callable

SEQUENCES, CELLS, PROMPT_TOKENS, OUTPUT_TOKENS, MICRO_BATCH = 16, 1024, 300, 32, 512


def run_nothing(name: str) -> None:
    """Only what is imported."""
    del name


def run_bare(name: str) -> None:
    """Each prompt in micro-batches, then everybody's tokens in calls of their own."""
    model = Model(name)
    with Context(
        model,
        n_ctx=SEQUENCES * CELLS,
        n_seq_max=SEQUENCES,
        n_batch=MICRO_BATCH,
        n_ubatch=MICRO_BATCH,
        n_outputs_max=SEQUENCES,
        kv_layout="streams",
    ) as context:
        for seq_id in range(SEQUENCES):
            tokens = distinct_prompt(model, seq_id, PROMPT_TOKENS)
            for first in range(0, PROMPT_TOKENS, MICRO_BATCH):
                part = tokens[first : first + MICRO_BATCH]
                batch = Batch()
                for pos, token in enumerate(part, first):
                    batch.add(token, pos, [seq_id], logits=pos == PROMPT_TOKENS - 1)
                context.decode(batch)
        for pos in range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS):
            rows = range(SEQUENCES)
            context.decode(
                Batch.from_arrays([100] * len(rows), [pos] * len(rows), rows, [True] * len(rows))
            )
            context.logits_all()


def run_engine(name: str) -> None:
    """The same tokens as requests."""
    model = Model(name)
    prompts = [distinct_prompt(model, seed, PROMPT_TOKENS) for seed in range(SEQUENCES)]
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    with Engine(
        model,
        max_num_seqs=SEQUENCES,
        n_ctx=SEQUENCES * CELLS,
        n_ubatch=MICRO_BATCH,
        kv_layout="streams",
    ) as engine:
        engine.generate(prompts, params)


CHILDREN: dict[str, Callable[[str], None]] = {
    "python": run_nothing,
    "llama.cpp by hand": run_bare,
    "engine": run_engine,
}


def peak_mib(child: str, name: str) -> float:
    """Of a child process."""
    command = [sys.executable, __file__, "--child", child, "--model", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["peak_mib"])


def main() -> None:
    """Run all children for each model."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--child", choices=CHILDREN, help="for this program's own use")
    given = options.parse_args()
    if given.child:
        CHILDREN[given.child](given.model[0])
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        print(json.dumps({"peak_mib": int(found[1]) / 1024}))
        return
    rows = []
    for model in models(given):
        python, bare, engine = (peak_mib(child, model.path) for child in CHILDREN)
        rows.append(
            {
                "model": model.description,
                "python MiB": python,
                "llama.cpp by hand MiB": bare,
                "engine MiB": engine,
                "engine over llama.cpp %": (engine - bare) / (bare - python) * 100,
            }
        )
    report("Peak resident memory", rows)
    write_json(given, rows)


if __name__ == "__main__":
    main()
