"""Many threads on one engine, for long enough to see a leak."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import batchcore as bc
import pytest
from batchcore.testing import synthetic_gguf

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def hammer(engine, thread, count, ended):
    """Submit, stream, cancel and drop at random; note how each request ended."""
    rng = random.Random(thread)
    for _ in range(count):
        params = bc.SamplingParams(
            max_tokens=rng.randint(1, 16), seed=rng.getrandbits(32), n=rng.choice((1, 1, 1, 2))
        )
        prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 60))]
        match rng.randrange(4):
            case 0:
                ended.append(engine.generate([prompt], params)[0].outputs[0].finish_reason)
            case 1:
                deltas = list(engine.stream(prompt, params))
                ended.append(deltas[-1].finish_reason)
            case 2:
                handle = engine.submit(prompt, params)
                if rng.random() < 0.5:
                    next(iter(handle), None)
                handle.cancel()
                ended.append(handle.result().outputs[0].finish_reason)
            case _:
                engine.submit(prompt, params)  # dropped at once
                ended.append("dropped")


def run_threads(engine, count):
    ended = []
    failures = []

    def guarded(thread):
        try:
            hammer(engine, thread, count, ended)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(thread,)) for thread in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return ended


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """So small that the engine, not the model, is what is busy."""
    return bc.Model(synthetic_gguf(tmp_path_factory.mktemp("model") / "llama.gguf", "llama"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_64_threads_with_random_cancels(small_model, layout):
    with bc.Engine(
        small_model, max_num_seqs=8, n_ctx=8 * 256, kv_layout=layout, check_integrity=True
    ) as engine:
        run_threads(engine, 2)  # allocators and caches reach their size
        gc.collect()
        before = resident_bytes()
        ended = run_threads(engine, 10)
        while engine.has_work:
            pass
        gc.collect()
        grown = resident_bytes() - before
        stats = engine.stats()
    assert len(ended) == 64 * 10
    assert set(ended) <= {"stop", "length", "cancelled", "dropped"}
    assert stats.num_finished["error"] == 0
    assert sum(stats.num_finished.values()) == 64 * 12
    assert (stats.num_running, stats.num_waiting, stats.num_active_cells) == (0, 0, 0)
    assert grown < 16 << 20, f"{grown >> 20} MiB more after 640 requests"


def test_engines_come_and_go_without_a_trace(smollm2):
    def once():
        with bc.Engine(smollm2, max_num_seqs=4, n_ctx=512) as engine:
            engine.generate("Hello", bc.SamplingParams(max_tokens=2))

    for _ in range(3):
        once()
    threads = threading.active_count()
    before = resident_bytes()
    for _ in range(10):
        once()
    assert threading.active_count() == threads
    assert resident_bytes() - before < 32 << 20
