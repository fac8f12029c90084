"""llama-parallel, upstream's example of continuous batching, with the prompts that it brings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import Measurement, Peer, PeerError, Setup
from batchcore.bench.peers.llama_server import program_version
from batchcore.bench.peers.process import run_to_end, tail_of

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.bench.peers.workloads import Case

__all__ = ["LlamaParallel", "parse_totals"]

_TOTAL = r"Total {} tokens:\s+(\d+), speed:\s+([\d.]+) t/s"


def parse_totals(text: str) -> dict[str, float | None]:
    """The figures that it prints at its end, under our names.

    Raises:
        PeerError: They are not there.
    """
    prompt, output = (re.search(_TOTAL.format(kind), text) for kind in ("prompt", "gen"))
    if prompt is None or output is None or not float(output[2]):
        raise PeerError(f"it printed no totals\n{tail_of(text)}")
    count, rate = int(output[1]), float(output[2])
    return {
        "total_s": count / rate,
        "output_tokens_per_s": rate,
        "num_prompt_tokens": int(prompt[1]),
        "num_output_tokens": count,
        "num_failed": 0,
    }


class LlamaParallel(Peer):
    """Runs to its end for each measurement, with as many requests as a workload has."""

    name = "llama-parallel"
    warms_up = False

    def __init__(self, program: Path) -> None:
        """Take the program."""
        self.version = program_version(program)
        self._path = program
        self._setup: Setup | None = None

    def why_not(self, case: Case) -> str | None:
        """Its own prompts are short questions, and nothing else."""
        return None if case.name == "short-chat" else "it has prompts of its own, all of them short"

    def start(self, setup: Setup) -> None:
        """Nothing to start."""
        self._setup = setup

    def run(self, case: Case) -> Measurement:
        """Run as many of its own prompts, with the system prompt shared by all of them."""
        setup = self._setup
        assert setup is not None
        params = case.workload.requests[0].params
        threads = str(setup.n_threads)
        command = [str(self._path), "-m", str(setup.model), "-c", str(setup.n_ctx), "-pps", "-kvu"]
        command += ["-np", str(setup.num_slots), "-ns", str(len(case.workload))]
        command += ["-n", str(params.max_tokens), "--ignore-eos", "-t", threads, "-tb", threads]
        if params.temperature == 0:
            command += ["--samplers", "top_k;temperature", "--top-k", "1", "--temp", "0"]
        else:
            command += ["--samplers", "top_k;temperature;top_p", "--top-k", str(params.top_k)]
            command += ["--top-p", str(params.top_p), "--temp", str(params.temperature)]
        text, kept = run_to_end(command, setup.limit_s)
        return Measurement(parse_totals(text) | kept, {"command": command[1:]})

    def stop(self) -> None:
        """Nothing is left."""
