"""Next-token distributions with our kernels are no further from F32 than those with ggml's.

The measure is the mean KL divergence from the dequantised model, see `batchcore.testing.quality`.
The two sides round otherwise, so that their figures differ by chance. Ours may be larger by three
standard errors of the difference, which is taken token by token.
"""

from __future__ import annotations

import math
from pathlib import Path

import batchcore as bc
import numpy as np
import pytest
from batchcore import prompts
from batchcore.testing import synthetic_gguf
from batchcore.testing.gguf_pairs import read_header
from batchcore.testing.quality import compare_distributions, write_f32

NUM_TOKENS = 200
SHAPE = {"n_layer": 2, "n_embd": 256, "n_ff": 512, "vocab": 512}

pytestmark = pytest.mark.skipif(
    bc.Model.available_kernels() == "ggml", reason="this CPU has no kernels of ours"
)


def compare(path: Path, folder: Path, models: dict[str, bc.Model]) -> dict[str, np.ndarray]:
    """KL divergence of each token, by model."""
    reference = bc.Model(write_f32(path, folder / "f32.gguf"), kernels="ggml")
    tokens = reference.tokenize(prompts.load()[4])[:NUM_TOKENS]
    found = compare_distributions(reference, models, tokens)
    kl = {name: np.array(each.kl) for name, each in found.items()}
    assert all(len(values) >= NUM_TOKENS for values in kl.values())
    return kl


def is_no_worse(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether the mean is no larger, but for three standard errors of the difference."""
    difference = ours - theirs
    margin = 3 * difference.std(ddof=1) / math.sqrt(len(difference))
    print(f"KL {ours.mean():.3g} and {theirs.mean():.3g} nats, margin {margin:.2g}")
    return difference.mean() <= margin


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q4_k_m"])
def test_synthetic_models(quant, tmp_path):
    """Formats with scales of 32 and of 256 weights."""
    path = synthetic_gguf(tmp_path / "m.gguf", quant=quant, **SHAPE)
    kl = compare(path, tmp_path, {"ours": bc.Model(path), "ggml": bc.Model(path, kernels="ggml")})
    assert 0 < kl["ours"].mean() < 0.01  # rounding, not another model
    assert is_no_worse(kl["ours"], kl["ggml"])


def test_a_real_model(smollm2, smollm2_path, tmp_path):
    """SmolLM2 in Q4_1, with an output head in Q8_0."""
    ggml = bc.Model(smollm2_path, kernels="ggml")
    kl = compare(smollm2_path, tmp_path, {"ours": smollm2, "ggml": ggml})
    assert 0 < kl["ours"].mean() < 0.02
    assert is_no_worse(kl["ours"], kl["ggml"])


def test_coarser_arithmetic_is_found(tmp_path):
    """The margin is small enough: weights that lose bits fail."""
    path = synthetic_gguf(tmp_path / "m.gguf", quant="f16", **SHAPE)
    worse = synthetic_gguf(tmp_path / "worse.gguf", quant="bf16", **SHAPE)
    kl = compare(path, tmp_path, {"same": bc.Model(path), "worse": bc.Model(worse)})
    assert not is_no_worse(kl["worse"], kl["same"])


def test_the_copy_in_f32_has_the_same_pairs_and_values(tmp_path):
    """Everything but the types of tensors stays."""
    path = synthetic_gguf(tmp_path / "m.gguf", quant="f32", n_layer=1)
    pairs, tensors = read_header(path)
    copied_pairs, copied_tensors = read_header(write_f32(path, tmp_path / "f32.gguf"))
    assert sorted(map(repr, copied_pairs)) == sorted(map(repr, pairs))
    assert copied_tensors == tensors
