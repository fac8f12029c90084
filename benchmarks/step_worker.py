"""The child process of `step_pairs.py`: one engine, stepped when it is told to.

Imports nothing of this folder, so that any batchcore that has `Engine.step` can be compared.
"""

from __future__ import annotations

import json
import os
import sys
import time

from batchcore import Engine, SamplingParams


def main() -> None:
    """Take the engine and its requests from the first line, then a step for each line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints must not come between the answers
    job = json.loads(sys.stdin.readline())
    waiting = [
        (one["prompt"], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=one["tokens"]))
        for one in reversed(job["requests"])
    ]
    with Engine(job["model"], autostart=False, **job["options"]) as engine:
        running = []
        rows_before = 0
        answers.write(json.dumps({"ready": True}) + "\n")
        answers.flush()
        for _ in sys.stdin:
            running = [handle for handle in running if not handle.finished]
            while waiting and len(running) < job["concurrency"]:
                running.append(engine.submit(*waiting.pop()))
            start = time.perf_counter()
            if running:
                engine.step()
            seconds = time.perf_counter() - start
            rows = engine.stats().num_decode_rows
            answer = {"s": seconds, "rows": rows - rows_before, "done": not running}
            rows_before = rows
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
