"""llama.cpp's log as Python logging, under the logger `batchcore.llama`.

The native core keeps the log in a bounded buffer, because llama.cpp logs from threads that must not
wait for the GIL. `forward` empties that buffer; it is called at points where a Python thread is in
charge anyway: after loading a model, and when an engine starts, closes or waits.
"""

from __future__ import annotations

import logging

from batchcore import _core

__all__ = ["forward", "logger"]

logger = logging.getLogger("batchcore.llama")

# A library is quiet until its user configures logging; without this, warnings would go to stderr.
logging.getLogger("batchcore").addHandler(logging.NullHandler())

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_DEBUG, _INFO = 1, 2


def forward() -> None:
    """Hand what llama.cpp has logged since the last call to `logging`. Any Python thread."""
    lines, dropped = _core.drain_log()
    # Debug lines would push the others out of the buffer, so they are kept only for who reads them.
    _core.set_log_level(_DEBUG if logger.isEnabledFor(logging.DEBUG) else _INFO)
    if dropped:
        logger.warning("%d older lines of llama.cpp's log were dropped", dropped)
    for level, text in lines:
        logger.log(_LEVELS.get(level, logging.INFO), "%s", text)
