"""The child process of `BatchcorePeer`: one engine, and workloads one after another.

Reads JSON objects from stdin, one per line: the engine to make, then runs; answers on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from batchcore.bench.load import _drive, _engine_client
from batchcore.bench.workload import Workload
from batchcore.engine import Engine
from batchcore.errors import BatchcoreError


def main() -> None:
    """Serve until stdin ends or says so."""
    # What anything else prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    try:
        engine = Engine(job["model"], **job["options"])
    except BatchcoreError as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    with engine:
        answer({"ready": True})
        for line in sys.stdin:
            run = json.loads(line)
            if "stop" in run:
                break
            result = _drive(
                Workload.from_trace(run["trace"]),
                _engine_client(engine, None),
                max_concurrency=run["max_concurrency"],
                group_concurrency=run["group_concurrency"],
            )
            answer(result.to_dict())


if __name__ == "__main__":
    main()
