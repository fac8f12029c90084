"""llama-batched-bench: what the kernels do without an engine around them, and without sampling."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import Measurement, Peer, PeerError, Setup
from batchcore.bench.peers.llama_server import program_version
from batchcore.bench.peers.process import run_to_end, tail_of
from batchcore.bench.peers.workloads import DECODE_OUTPUT_TOKENS, DECODE_PROMPT_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from batchcore.bench.peers.workloads import Case

__all__ = ["LlamaBatchedBench", "parse_jsonl"]


def parse_jsonl(text: str, size: int) -> dict[str, float | None]:
    """The figures of one batch size, under our names.

    Raises:
        PeerError: There is no such line.
    """
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if row.get("pl") == size:
            return {
                "total_s": row["t"],
                "output_tokens_per_s": size * row["tg"] / row["t"],
                "decode_tokens_per_s": row["speed_tg"],
                "full_decode_tokens_per_s": row["speed_tg"],
                "prefill_tokens_per_s": row["speed_pp"],
                "num_output_tokens": size * row["tg"],
                "num_failed": 0,
            }
    raise PeerError(f"it printed nothing for a batch of {size}\n{tail_of(text)}")


class LlamaBatchedBench(Peer):
    """Runs to its end for each measurement, and says itself how long each phase took."""

    name = "llama-batched-bench"
    warms_up = False

    def __init__(self, program: Path) -> None:
        """Take the program."""
        self.version = program_version(program)
        self._path = program
        self._setup: Setup | None = None

    def why_not(self, case: Case) -> str | None:
        """It only knows batches that start and decode together."""
        return None if case.decode_size else "it runs decode workloads only"

    def start(self, setup: Setup) -> None:
        """Nothing to start."""
        self._setup = setup

    def run(self, case: Case) -> Measurement:
        """Run the batch size of a decode workload."""
        assert self._setup is not None
        assert case.decode_size is not None
        threads = str(self._setup.n_threads)
        command = [str(self._path), "-m", str(self._setup.model), "-c", str(self._setup.n_ctx)]
        command += ["-npp", str(DECODE_PROMPT_TOKENS), "-ntg", str(DECODE_OUTPUT_TOKENS)]
        command += ["-npl", str(case.decode_size), "-t", threads, "-tb", threads]
        command += ["--output-format", "jsonl"]
        text, kept = run_to_end(command, self._setup.limit_s)
        metrics = parse_jsonl(text, case.decode_size) | kept
        return Measurement(metrics, {"command": command[1:]})

    def stop(self) -> None:
        """Nothing is left."""
