"""In-process inference engine that batches many requests over llama.cpp."""

from __future__ import annotations

# First, because it refuses to import on a CPU where loading _core would be an illegal instruction.
from batchcore import _cpu  # noqa: F401
from batchcore._core import __version__

__all__ = ["__version__"]
