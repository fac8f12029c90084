"""Fixtures for tests that need a real model, which is pulled once and kept in the cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from batchcore import models
from batchcore.model import Model

if TYPE_CHECKING:
    from pathlib import Path


# One core for all tests, and so one compute thread per engine: ggml's threads wait for each other
# by spinning, which on a machine with anything else to do takes many times as long
# (docs/design.md). Tests of several threads ask for them.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M instruct: attention, byte-level BPE, a chat template."""
    return models.pull("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M: sliding window, SentencePiece, 262,144 tokens, no chat template."""
    return models.pull("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Model:
    """Loaded once: models are immutable."""
    return Model(smollm2_path)


@pytest.fixture(scope="session")
def gemma3(gemma3_path: Path) -> Model:
    """Loaded once: models are immutable."""
    return Model(gemma3_path)
