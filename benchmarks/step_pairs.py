"""Engines compared step by step: options, or builds, on the requests of `mixed`.

Each engine runs in a process of its own, and makes a step when it is its turn: while one computes,
the others wait. A machine that speeds up or slows down for seconds tells on all of them alike, so
that differences of a few percent show in one run. Time to the first token says nothing here.

    python benchmarks/step_pairs.py --variant '{}' --variant '{"kv_layout": "unified"}'
    python benchmarks/step_pairs.py --python this/bin/python --python other/bin/python

The second compares the batchcores of two virtual environments. Ratios are to the first engine.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore.bench.peers.lines import LineProgram
from batchcore.bench.peers.workloads import SAMPLINGS, make_case
from common import models, report, write_json
from common import parser as make_parser

if TYPE_CHECKING:
    from batchcore import Model
    from batchcore.bench.peers.workloads import Case

WORKER = Path(__file__).with_name("step_worker.py")
LIMIT_S = 600.0


class Stepped:
    """One of the engines."""

    def __init__(self, python: str, options: dict[str, Any], model: Model, case: Case) -> None:
        """Start it."""
        self.name = f"{python} {json.dumps(options)}"
        self.is_done = False
        self.total_s = 0.0
        self.num_steps = 0
        self.itl_s: list[float] = []
        """Of every row that decoded: the time of its step."""
        cells = case.n_ctx // case.num_slots
        defaults = {
            "max_num_seqs": case.num_slots,
            "n_ctx": case.n_ctx,
            "max_sequence_tokens": cells,
        }
        self._program = LineProgram([python, str(WORKER)])
        self._program.send(
            {
                "model": model.path,
                "options": {**defaults, **options},
                "concurrency": case.num_slots,
                "requests": [
                    {"prompt": list(one.prompt), "tokens": one.params.max_tokens}
                    for one in case.workload.requests
                ],
            }
        )
        self._program.receive(LIMIT_S)

    def step(self) -> None:
        """Make one."""
        self._program.send({})
        answer = self._program.receive(LIMIT_S)
        self.is_done = answer["done"]
        if not self.is_done:
            self.total_s += answer["s"]
            self.num_steps += 1
            self.itl_s += [answer["s"]] * answer["rows"]

    def stop(self) -> None:
        """End it."""
        self._program.stop()


def run(engines: list[Stepped]) -> None:
    """All of them to their end, who is first in turn."""
    order = list(engines)
    while order:
        for engine in order:
            engine.step()
        order = [engine for engine in order[1:] + order[:1] if not engine.is_done]


def main() -> None:
    """Compare on each model."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--variant", action="append", type=json.loads, help="options, as JSON")
    options.add_argument("--python", action="append", help="default: this one")
    options.add_argument("--rounds", type=int, default=2)
    given = options.parse_args()
    pairs = [
        (python, variant)
        for python in given.python or [sys.executable]
        for variant in given.variant or [{}]
    ]
    rows: list[dict[str, Any]] = []
    for model in models(given):
        rounds: list[list[Stepped]] = []
        for number in range(given.rounds):
            case = make_case("mixed", model, SAMPLINGS["greedy"], seed=number)
            engines: list[Stepped] = []
            try:
                engines.extend(Stepped(*pair, model, case) for pair in pairs)
                run(engines)
            finally:
                for engine in engines:
                    engine.stop()
            rounds.append(engines)
        for same in zip(*rounds, strict=True):
            ratios = [
                one.total_s / engines[0].total_s for one, engines in zip(same, rounds, strict=True)
            ]
            itl_s = sorted(time_s for one in same for time_s in one.itl_s)
            rows.append(
                {
                    "model": model.description,
                    "engine": same[0].name,
                    "steps": statistics.mean(one.num_steps for one in same),
                    "total s": statistics.mean(one.total_s for one in same),
                    "ratio": statistics.median(ratios),
                    "range": f"{min(ratios):.3f} - {max(ratios):.3f}",
                    "p50 ITL ms": itl_s[len(itl_s) // 2] * 1e3,
                    "p99 ITL ms": itl_s[len(itl_s) * 99 // 100] * 1e3,
                }
            )
    report("Step by step", rows)
    write_json(given, rows)


if __name__ == "__main__":
    main()
