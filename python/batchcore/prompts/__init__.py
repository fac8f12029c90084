"""Forty prompts to try things with: five to 400 words, several styles, twelve languages.

The order mixes short and long ones, so that the first few of them are varied too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BundledPrompt", "load", "load_all"]


@dataclass(frozen=True, slots=True)
class BundledPrompt:
    """A prompt, and what it is good for."""

    kind: str
    """Its style: `story`, `code`, `email`, ..."""
    language: str
    """ISO 639-1 code."""
    text: str


def load_all() -> list[BundledPrompt]:
    """All prompts with their kind and language, in a fixed order."""
    file = Path(__file__).with_name("prompts.jsonl")
    with file.open(encoding="utf-8") as lines:
        return [BundledPrompt(**json.loads(line)) for line in lines]


def load() -> list[str]:
    """The texts of all prompts, in a fixed order."""
    return [prompt.text for prompt in load_all()]
