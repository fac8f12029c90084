"""batchcore itself, in a process of its own so that memory and threads are as fresh as a peer's."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.bench.load import LoadResult
from batchcore.bench.metrics import RequestRecord
from batchcore.bench.peers.base import Measurement, Peer, PeerError, Setup
from batchcore.bench.peers.kernel_bound import occupancy, positions
from batchcore.bench.peers.lines import LineProgram
from batchcore.bench.peers.measure import measure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchcore.bench.peers.workloads import Case

__all__ = ["VARIANTS", "BatchcorePeer"]

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "batchcore": {},
    "batchcore-streams": {"kv_layout": "streams", "prefix_caching": False},
}
"""Options of the engine, by the name of the peer; everything else is the default."""


class BatchcorePeer(Peer):
    """An engine in a child process, driven there by `run_load`'s driver."""

    warms_up = True

    def __init__(self, name: str) -> None:
        """Take one of `VARIANTS`."""
        self.name = name
        self.version = _core.build_info()["version"]
        self._program: LineProgram | None = None
        self._limit_s = 0.0

    def why_not(self, case: Case) -> str | None:
        """It runs all of them."""
        del case
        return None

    def start(self, setup: Setup) -> None:
        """Load the model in a child process."""
        self._limit_s = setup.limit_s
        self._program = LineProgram([sys.executable, "-m", "batchcore.bench.peers.engine_worker"])
        options = {
            "max_num_seqs": setup.num_slots,
            "n_ctx": setup.n_ctx,
            "max_sequence_tokens": setup.n_ctx // setup.num_slots,  # as for everybody else
            "n_threads": setup.n_threads,
            **VARIANTS[self.name],
        }
        self._program.send({"model": str(setup.model), "options": options})
        self._program.receive(setup.limit_s)

    def run(self, case: Case) -> Measurement:
        """Hand the workload over as a trace, and take the records back."""
        assert self._program is not None
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.jsonl"
            case.workload.save(trace)
            self._program.send(
                {
                    "trace": str(trace),
                    "max_concurrency": case.max_concurrency,
                    "group_concurrency": case.group_concurrency,
                }
            )
            answer = self._program.receive(self._limit_s)
        try:
            result = _result_of(answer)
            found = measure(result, case, self._program.peak_rss_bytes())
        except PeerError as error:
            raise self._program.failure(str(error)) from None
        found.details["sum_of_positions"] = positions(result.records)
        found.details["tokens_by_rows"] = {
            str(rows): count for rows, count in occupancy(result.records).items()
        }
        return found

    def stop(self) -> None:
        """End the child process."""
        if self._program is not None:
            with suppress(PeerError):
                self._program.send({"stop": True})
            self._program.stop()


def _result_of(answer: dict[str, Any]) -> LoadResult:
    records = []
    for row in answer["requests"]:
        del row["tpot_s"]  # is computed
        for name in ("completion_tokens", "itl_s"):
            row[name] = tuple(row[name])
        records.append(RequestRecord(**row))
    interrupted = answer["interrupted"]
    return LoadResult(
        answer["num_requests"], records, total_s=answer["total_s"], interrupted=interrupted
    )
