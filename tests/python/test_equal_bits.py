"""Tokens and log-probabilities do not depend on the load: equal to the bit, on real models.

This holds with batchcore's own kernels. Each test computes the same prompts in another way than one
after another, and compares every log-probability with `==`.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import batchcore as bc
import pytest

NUM_PROMPTS = 64
MAX_TOKENS = 16
LENGTHS = (3, 9, 20, 41, 130)
WORDS = [
    "river",
    "stone",
    "light",
    "garden",
    "engine",
    "paper",
    "winter",
    "signal",
    "market",
    "window",
    "copper",
    "letter",
    "the",
    "a",
    "of",
    "in",
    "when",
    "because",
    "under",
    "over",
    "small",
    "quick",
    "seven",
    "science",
    "history",
    "city",
    "water",
    "mountain",
]

PARAMS = bc.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=3)

pytestmark = pytest.mark.skipif(
    bc.Model.available_kernels() == "ggml", reason="this CPU has no kernels of ours"
)


def make_prompts(count: int = NUM_PROMPTS) -> list[str]:
    """Prompts of mixed lengths; some share their beginning, some repeat themselves."""
    rng = random.Random(11)
    shared = " ".join(rng.choice(WORDS) for _ in range(60))
    prompts = []
    for number in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(LENGTHS[number % len(LENGTHS)]))
        if number % 5 == 0:
            text = f"{shared} {text}"
        if number % 7 == 0:
            text = " ".join([text[:60]] * 4)
        prompts.append(text)
    return prompts


def bits(output: bc.RequestOutput) -> tuple:
    """All that a request returns about its tokens."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    entries = [(entry.token, entry.logprob, tuple(entry.top)) for entry in completion.logprobs]
    return tuple(completion.token_ids), completion.finish_reason, tuple(entries)


def run(model: bc.Model, prompts: list[str], **options) -> tuple[list[tuple], bc.EngineStats]:
    """Compute all prompts at once."""
    with bc.Engine(model, **options) as engine:
        outputs = engine.generate(prompts, PARAMS)
        return [bits(output) for output in outputs], engine.stats()


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def case(request):
    """A model, its prompts and what they give one after another."""
    model = request.getfixturevalue(request.param)
    prompts = make_prompts()
    with bc.Engine(model, max_num_seqs=1, n_ctx=2048, prefix_caching=False) as engine:
        alone = [bits(engine.generate([prompt], PARAMS)[0]) for prompt in prompts]
    return model, prompts, alone


@pytest.mark.parametrize(
    ("count", "options", "counter"),
    [
        (64, {"max_num_seqs": 64, "n_ctx": 32768, "kv_layout": "unified"}, None),
        (32, {"max_num_seqs": 16, "n_ctx": 16384, "kv_layout": "streams"}, None),
        (24, {"max_num_seqs": 7, "n_ctx": 8192, "n_ubatch": 37}, None),
        (
            24,
            {"max_num_seqs": 4, "n_ctx": 8192, "num_speculative_tokens": 5},
            "num_accepted_tokens",
        ),
        (24, {"max_num_seqs": 4, "n_ctx": 8192, "kv_layout": "unified"}, "num_cached_tokens"),
    ],
    ids=["64 at once", "streams", "small chunks", "speculation", "prefixes"],
)
def test_the_load_changes_nothing(case, count, options, counter):
    """However the engine batches, cuts or guesses."""
    model, prompts, alone = case
    got, stats = run(model, prompts[:count], **options)
    assert got == alone[:count]
    assert stats.is_batch_invariant, stats.variant_operations
    if counter is not None:
        assert getattr(stats, counter) > 0  # the run did what it is here for


@pytest.mark.parametrize(
    ("preemption", "counter"), [("auto", "num_preemptions"), ("save", "num_saves")]
)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_tight_memory_changes_nothing(request, name, preemption, counter):
    """Sequences that are preempted, computed again or restored."""
    model = request.getfixturevalue(name)
    params = dataclasses.replace(PARAMS, max_tokens=60, ignore_eos=True)
    prompts = [prompt[:150] for prompt in make_prompts(12)]
    with bc.Engine(model, max_num_seqs=1, n_ctx=512, prefix_caching=False) as engine:
        alone = [bits(engine.generate([prompt], params)[0]) for prompt in prompts]
    with bc.Engine(
        model, max_num_seqs=12, n_ctx=256, kv_layout="unified", preemption=preemption
    ) as engine:
        assert [bits(output) for output in engine.generate(prompts, params)] == alone
        assert getattr(engine.stats(), counter) > 0


@pytest.mark.parametrize("type_kv", ["f32", "bf16", "q8_0"])
def test_every_cache_type(smollm2, type_kv):
    """Types of the KV cache change outputs, but not with the load."""
    prompts = make_prompts(12)
    options = {"type_k": type_kv, "type_v": type_kv, "flash_attn": "on", "n_ctx": 4096}
    with bc.Engine(smollm2, max_num_seqs=1, prefix_caching=False, **options) as engine:
        alone = [bits(engine.generate([prompt], PARAMS)[0]) for prompt in prompts]
    got, _ = run(smollm2, prompts, max_num_seqs=12, **options)
    assert got == alone


def test_arrival_order_changes_nothing(case):
    """Requests that arrive in another order meet other neighbours."""
    model, prompts, alone = case
    order = list(range(len(prompts)))
    random.Random(3).shuffle(order)
    got, _ = run(model, [prompts[i] for i in order], max_num_seqs=16, n_ctx=16384)
    assert got == [alone[i] for i in order]


def test_a_prefix_from_host_memory(smollm2):
    """What was evicted to host memory and came back gives the same bits."""
    shared = " ".join(make_prompts()[:40])[:2400]
    with bc.Engine(
        smollm2, max_num_seqs=2, n_ctx=1536, kv_layout="unified", host_cache_bytes=1 << 28
    ) as engine:
        first = bits(engine.generate([shared], PARAMS)[0])
        for number in range(4):
            engine.generate([f"{number} " + " ".join(make_prompts()[30:])[:2600]], PARAMS)
        again = bits(engine.generate([shared], PARAMS)[0])
        assert engine.stats().num_host_tokens > 0
    assert again == first


SCRIPT = """
import os, sys, batchcore as bc
if hasattr(os, "sched_setaffinity"):  # conftest.py leaves one core, where threads would only wait
    os.sched_setaffinity(0, range(os.cpu_count()))
sys.path.insert(0, sys.argv[1])
import test_equal_bits as t
got, _ = t.run(bc.Model(sys.argv[2]), t.make_prompts(10), max_num_seqs=10, n_ctx=8192,
               n_threads=int(sys.argv[3]), kv_layout="unified")
print(bc.Model.available_kernels(), repr(got))
"""


def run_in_process(path: str, kernels: str, n_threads: int) -> tuple[str, str]:
    """The instruction set in use, and the outputs as text."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), path, str(n_threads)],
        env={**os.environ, "BATCHCORE_KERNELS": kernels},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    name, _, outputs = result.stdout.partition(" ")
    return name, outputs


def test_threads_and_instruction_sets_change_nothing(smollm2_path):
    """One thread or two; AVX2 or the best that this CPU has."""
    best, expected = run_in_process(str(smollm2_path), "auto", 1)
    assert best != "ggml"
    assert run_in_process(str(smollm2_path), "auto", 2) == (best, expected)
    assert run_in_process(str(smollm2_path), "avx2", 1) == ("avx2", expected)


def test_ggml_kernels_say_so(smollm2_path):
    """With `kernels="ggml"` outputs may depend on the load, and the engine reports it."""
    model = bc.Model(smollm2_path, kernels="ggml")
    assert model.kernels == "ggml"
    with bc.Engine(model, max_num_seqs=2, n_ctx=512) as engine:
        assert engine.stats().is_batch_invariant is None
        engine.generate(["Hello"], PARAMS)
        assert engine.stats().is_batch_invariant is False
        assert "ggml kernels" in engine.stats().variant_operations


def test_attention_without_flash_attention_is_named(smollm2):
    """What prevents equal bits is said by name."""
    with bc.Engine(smollm2, max_num_seqs=2, n_ctx=512, flash_attn="off") as engine:
        engine.generate(["Hello"], PARAMS)
        assert "attention" in engine.stats().variant_operations
