"""llama-parallel, upstream's example of continuous batching, with the prompts that it brings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import PeerError
from batchcore.bench.peers.once import RunsOnce
from batchcore.bench.peers.process import tail_of

if TYPE_CHECKING:
    from batchcore.bench.peers.base import Setup
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


class LlamaParallel(RunsOnce):
    """Answers as many requests as a workload has."""

    program = "llama-parallel"

    def why_not(self, case: Case) -> str | None:
        """Its own prompts are short questions, and nothing else."""
        return None if case.name == "short-chat" else "it has prompts of its own, all of them short"

    def arguments(self, setup: Setup, case: Case) -> list[str]:
        """As many of its own prompts, with the system prompt shared by all of them."""
        params = case.workload.requests[0].params
        given = ["-pps", "-kvu", "-np", str(setup.num_slots), "-ns", str(len(case.workload))]
        given += ["-n", str(params.max_tokens), "--ignore-eos"]
        if params.temperature == 0:
            return [*given, "--samplers", "top_k;temperature", "--top-k", "1", "--temp", "0"]
        given += ["--samplers", "top_k;temperature;top_p", "--top-k", str(params.top_k)]
        return [*given, "--top-p", str(params.top_p), "--temp", str(params.temperature)]

    def figures(self, text: str, case: Case) -> dict[str, float | None]:
        """Its totals."""
        del case
        return parse_totals(text)
