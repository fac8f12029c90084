"""What a measurement has to be read with: machine, versions, model."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore import _core
from batchcore.engine_options import usable_cores

if TYPE_CHECKING:
    from batchcore.model import Model

__all__ = ["describe_environment", "describe_model"]


def describe_environment() -> dict[str, Any]:
    """Command, time, machine and versions, ready for JSON."""
    return {
        "command": _command(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": usable_cores(),
        # What others did to the machine meanwhile; None where the system doesn't say.
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "devices": _core.devices(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "build": _core.build_info(),
    }


def describe_model(model: Model) -> dict[str, Any]:
    """File, hash and size of a model, ready for JSON. Reads the whole file."""
    file = Path(model.path)
    return {
        "path": str(file),
        "file_name": file.name,
        "sha256": _sha256(file),
        "description": model.description,
        "num_params": model.n_params,
        "size_bytes": model.size_bytes,
    }


def _command() -> str:
    """As it was typed, more or less: without the folders of the interpreter and of a script."""
    interpreter, *rest = sys.orig_argv
    if rest and rest[0] == sys.argv[0]:
        rest[0] = Path(rest[0]).name
        is_installed = not rest[0].endswith(".py")
        return shlex.join(rest if is_installed else [Path(interpreter).name, *rest])
    return shlex.join([Path(interpreter).name, *rest])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cpu_name() -> str:
    # platform.processor() is empty or only the architecture on most Linux systems.
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
