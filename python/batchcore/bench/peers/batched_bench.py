"""llama-batched-bench: what the kernels do without an engine around them, and without sampling."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from batchcore.bench.peers.base import PeerError
from batchcore.bench.peers.once import RunsOnce
from batchcore.bench.peers.process import tail_of

if TYPE_CHECKING:
    from batchcore.bench.peers.base import Setup
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


class LlamaBatchedBench(RunsOnce):
    """Says itself how long each phase took."""

    program = "llama-batched-bench"

    def why_not(self, case: Case) -> str | None:
        """It only knows batches that start and decode together."""
        return None if case.decode_size else "it runs decode workloads only"

    def arguments(self, setup: Setup, case: Case) -> list[str]:
        """The batch size of a decode workload, and its lengths, which are those of all requests."""
        del setup
        request = case.workload.requests[0]
        lengths = ["-npp", str(len(request.prompt)), "-ntg", str(request.params.max_tokens)]
        return [*lengths, "-npl", str(case.decode_size), "--output-format", "jsonl"]

    def figures(self, text: str, case: Case) -> dict[str, float | None]:
        """Of that batch size."""
        assert case.decode_size is not None
        return parse_jsonl(text, case.decode_size)
