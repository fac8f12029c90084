"""Helpers for tests and benchmarks: small GGUFs with random weights, of many architectures.

Needs the `testing` extra (`pip install 'batchcore[testing]'`), which is imported when a file is
made.
"""

from __future__ import annotations

from batchcore.testing.architectures import ARCHITECTURES, LLAMA_8B
from batchcore.testing.synthetic import synthetic_gguf

__all__ = ["ARCHITECTURES", "LLAMA_8B", "synthetic_gguf"]
