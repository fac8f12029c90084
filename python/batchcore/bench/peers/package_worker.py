"""Runs the engine of another Python package, for a parent that speaks in JSON, one per line.

The parent runs this file by its path, with a Python that has the package and perhaps nothing of
ours; so it imports nothing but the standard library and that package.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_THREADS = 256


class Engine(Protocol):
    """What is made of a package."""

    num_threads: int
    """Requests that it takes at a time."""

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Run a request, call `tell` with the number of tokens so far; gives those of a cache."""


class LlamaCppPython:
    """llama-cpp-python's high-level class, one request after another."""

    num_threads = 1

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load the model."""
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        self._llama = llama_cpp.Llama(
            setup["model"],
            n_ctx=setup["n_ctx"] // setup["num_slots"],
            n_threads=setup["n_threads"],
            n_threads_batch=setup["n_threads"],
            flash_attn=True,  # as the others find out by themselves
            swa_full=setup["keeps_prefixes"],
            verbose=False,
        )

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Take tokens until there are enough: `generate` does not look for the end of a text."""
        tokens = self._llama.generate(
            job["prompt"],
            temp=job["temperature"],
            top_k=job["top_k"],
            top_p=job["top_p"],
            min_p=0.0,
        )
        for count, token in enumerate(tokens, start=1):
            self._llama.detokenize([token])  # who asks wants text, as from the others
            tell(count)
            if count == job["max_tokens"]:
                break
        return 0


class Xllamacpp:
    """xllamacpp's server class, called in its process and not over HTTP."""

    num_threads = _MAX_THREADS

    def __init__(self, setup: dict[str, Any]) -> None:
        """Start the server, which listens at a port too that nobody uses."""
        import xllamacpp  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

        params = xllamacpp.CommonParams()
        params.model.path = setup["model"]
        params.n_ctx = setup["n_ctx"]
        params.n_parallel = setup["num_slots"]
        params.kv_unified = False
        params.cpuparams.n_threads = setup["n_threads"]
        params.cpuparams_batch.n_threads = setup["n_threads"]
        if setup["keeps_prefixes"]:
            params.swa_full = True
        else:
            params.cache_ram_mib = 0
            params.n_ctx_checkpoints = 0
        self._server = xllamacpp.Server(params)

    def run(self, job: dict[str, Any], tell: Any) -> int:
        """Stream; the callback comes on the thread of the call."""
        cached = 0
        failures: list[str] = []

        def on_event(event: Any) -> bool:
            nonlocal cached
            if "error" in event:
                failures.append(str(event["error"]))
                return True
            timings = event.get("timings", {})
            cached = timings.get("cache_n", 0)
            tell(timings.get("predicted_n", 0))
            return False

        is_greedy = job["temperature"] == 0
        request = {
            "prompt": job["prompt"],
            "max_tokens": job["max_tokens"],
            "ignore_eos": True,
            "stream": True,
            "timings_per_token": True,
            "temperature": job["temperature"],
            "samplers": ["top_k", "temperature", *([] if is_greedy else ["top_p"])],
            "top_k": 1 if is_greedy else job["top_k"],
            "top_p": job["top_p"],
            "seed": job["seed"],
        }
        self._server.handle_completions(request, on_event)
        if failures:
            raise RuntimeError(failures[0])
        return cached


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "llama-cpp-python": LlamaCppPython,
    "xllamacpp": Xllamacpp,
}


def main() -> None:
    """Load the engine that is named, then serve requests until stdin ends."""
    # What the package prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def answer(**values: Any) -> None:
        line = json.dumps(values) + "\n"
        with lock:
            answers.write(line)
            answers.flush()

    try:
        engine = ENGINES[sys.argv[1]](json.loads(sys.stdin.readline()))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)

    def serve(job: dict[str, Any]) -> None:
        so_far = 0

        def tell(count: int) -> None:
            nonlocal so_far
            if count > so_far:
                so_far = count
                answer(id=job["id"], count=count, at=time.perf_counter())

        try:
            cached = engine.run(job, tell)
        except Exception as error:
            answer(id=job["id"], failed=f"{type(error).__name__}: {error}")
        else:
            answer(id=job["id"], done=True, cached=cached)

    with ThreadPoolExecutor(engine.num_threads) as pool:
        for line in sys.stdin:
            pool.submit(serve, json.loads(line))


if __name__ == "__main__":
    main()
