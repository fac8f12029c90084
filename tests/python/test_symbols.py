"""Our llama.cpp stays ours: nothing of it leaves the module, so another one can live beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from batchcore import _core

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF symbols")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_only_the_init_function_is_exported() -> None:
    assert _core.__file__ is not None
    listing = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--format=posix", _core.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert [line.split()[0] for line in listing.splitlines()] == ["PyInit__core"]


BESIDE_ANOTHER = """
import sys
import llama_cpp
import batchcore
from batchcore.lowlevel import Batch, Context
from batchcore.model import Model

path, prompt = sys.argv[1], "The capital of France is"
theirs = llama_cpp.Llama(path, n_ctx=256, verbose=False)
answer = theirs(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"]
model = Model(path)
tokens = model.tokenize(prompt)
ours = []
with Context(model, n_ctx=256) as context:
    position = 0
    while len(ours) < 4:
        positions = list(range(position, position + len(tokens)))
        context.decode(Batch.from_arrays(tokens, positions, [0] * len(tokens)))
        position += len(tokens)
        tokens = [context.logits().argmax()]
        ours += tokens
assert model.detokenize(ours) == answer, (model.detokenize(ours), answer)
assert theirs(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"] == answer
"""


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_another_llama_cpp_in_the_same_process(smollm2_path: Path) -> None:
    command = [sys.executable, "-c", BESIDE_ANOTHER, str(smollm2_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
