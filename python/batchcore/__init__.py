"""In-process inference engine that batches many requests over llama.cpp."""

from __future__ import annotations

from batchcore._core import __version__

__all__ = ["__version__"]
