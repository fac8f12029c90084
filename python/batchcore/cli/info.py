"""`batchcore info`: what this build is and what it can run on."""

from __future__ import annotations

import json

from batchcore import _core


def info() -> None:
    """Print version, llama.cpp commit, CPU features, backends and devices."""
    print(json.dumps({"build": _core.build_info(), "devices": _core.devices()}, indent=2))
