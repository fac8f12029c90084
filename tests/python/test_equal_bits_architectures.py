"""Equal bits on every architecture that can generate, or the operation that prevents them.

The models are small, with random weights. Each runs the same prompts alone and in other ways. If
the engine says that outputs do not depend on the load, then every token and log-probability must be
the same to the bit. If it does not say so, it must name an operation.
"""

from __future__ import annotations

import random

import batchcore as bc
import pytest
from batchcore.testing import ARCHITECTURES, synthetic_gguf

# The vocabulary spells text in bytes, so that these are tokens, too.
LENGTHS = (1, 7, 16, 33, 50, 64, 300)
PARAMS = bc.SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, ignore_eos=True)
SIZES = {"n_layer": 2, "n_embd": 256, "n_ff": 320, "vocab": 384}
EXPERTS = {"n_expert": 6, "n_expert_used": 2}

# Attention, mixtures of experts, sliding windows, recurrent states and hybrids; and formats of
# weights that take other code. An engine does not take encoder-decoders (t5).
CASES = {
    "llama": {"arch": "llama", "quant": "q4_k_m"},
    "llama f32": {"arch": "llama", "quant": "f32"},
    "llama f16": {"arch": "llama", "quant": "f16", "n_embd": 72, "n_head": 3, "n_head_kv": 1},
    "llama, experts": {"arch": "llama", "quant": "q4_k_m", **EXPERTS},
    "llama f32, experts": {"arch": "llama", "quant": "f32", **EXPERTS},
    "qwen2": {"arch": "qwen2", "quant": "q8_0"},
    "qwen3": {"arch": "qwen3", "quant": "q4_0", "head_dim": 80},
    "gemma3": {"arch": "gemma3", "quant": "q8_0", "sliding_window": 32},
    "mamba2": {"arch": "mamba2", "quant": "q4_k"},
    "mamba2, odd sizes": {"arch": "mamba2", "quant": "f32", "ssm_state": 40, "ssm_group": 2},
    "falcon-h1": {"arch": "falcon-h1", "quant": "q4_k"},
    "lfm2": {"arch": "lfm2", "quant": "q8_0"},
}
# Operations that make outputs of a case depend on the load; none today.
VARIANT_OPERATIONS: dict[str, set[str]] = {}

# How else the prompts are run.
RUNS = {
    "together": {},
    "small chunks": {"n_ubatch": 37},
    "few at a time": {"max_num_seqs": 3},
    "unified": {"kv_layout": "unified"},
    "streams": {"kv_layout": "streams"},
    "speculation": {"num_speculative_tokens": 4},
}

needs_kernels = pytest.mark.skipif(
    bc.Model.available_kernels() == "ggml", reason="this CPU has no kernels of ours"
)


def make_prompts() -> list[str]:
    """Letters at random, and one prompt that repeats itself."""
    rng = random.Random(5)
    texts = ["".join(rng.choice("abcdefgh ,.") for _ in range(n)) for n in LENGTHS]
    return [*texts, "abc def " * 6]


def bits(output: bc.RequestOutput) -> tuple:
    """All that a request returns about its tokens."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    entries = [(entry.token, entry.logprob, tuple(entry.top)) for entry in completion.logprobs]
    return tuple(completion.token_ids), tuple(entries)


def run_all(model: bc.Model) -> tuple[set[str], list[str]]:
    """The operations that the engines named, and the runs whose outputs are not those alone."""
    prompts = make_prompts()
    with bc.Engine(model, max_num_seqs=1, n_ctx=512, prefix_caching=False, n_threads=1) as engine:
        alone = [bits(engine.generate([prompt], PARAMS)[0]) for prompt in prompts]
        named = set(engine.stats().variant_operations)
    parted = []
    for run, options in RUNS.items():
        settings = {"max_num_seqs": 8, "n_ctx": 8 * 512, "n_threads": 1} | options
        with bc.Engine(model, **settings) as engine:
            outputs = [bits(output) for output in engine.generate(prompts, PARAMS)]
            stats = engine.stats()
        named |= set(stats.variant_operations)
        assert stats.is_batch_invariant == (not stats.variant_operations)
        if outputs != alone:
            parted.append(run)
    print(f"{', '.join(sorted(named)) or 'invariant'}; parted: {', '.join(parted) or 'none'}")
    return named, parted


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_equal_bits_or_the_operation_is_named(name, tmp_path):
    """What `is_batch_invariant` says is true."""
    named, parted = run_all(bc.Model(synthetic_gguf(tmp_path / "m.gguf", **(SIZES | CASES[name]))))
    assert named or not parted
    assert named == VARIANT_OPERATIONS.get(name, set())


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_these_runs_find_kernels_that_depend_on_the_load(name, tmp_path):
    """With ggml's kernels, bits differ and the engine says so."""
    path = synthetic_gguf(tmp_path / "m.gguf", **(SIZES | CASES[name]))
    named, parted = run_all(bc.Model(path, kernels="ggml"))
    assert "ggml kernels" in named
    assert parted


def test_every_architecture_that_generates_is_covered(tmp_path):
    """A new architecture gets a case."""
    for arch in ARCHITECTURES:
        model = bc.Model(synthetic_gguf(tmp_path / "m.gguf", arch, n_layer=1, vocab=384))
        assert not model.can_generate or any(case["arch"] == arch for case in CASES.values())
