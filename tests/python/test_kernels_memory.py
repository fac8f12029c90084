"""Where a repacked copy of the weights does not fit, ggml's kernels run the model."""

from __future__ import annotations

import subprocess
import sys

import batchcore as bc
import pytest

pytestmark = pytest.mark.skipif(
    bc.Model.available_kernels() == "ggml" or sys.platform != "linux",
    reason="needs kernels of ours, and limits of the address space",
)

SCRIPT = """
import resource, sys
import batchcore as bc
path, megabytes = sys.argv[1], int(sys.argv[2])
bc.Model(path, vocab_only=True)  # what every load needs once
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
limit = used * 1024 + megabytes * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    print(bc.Model(path).kernels)
except bc.BatchcoreError as error:
    print(type(error).__name__)
"""


def test_ggml_kernels_where_memory_is_short(smollm2_path):
    """From too little for anything (97 MB of weights) to enough for a copy."""
    seen = []
    for megabytes in range(60, 240, 20):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(smollm2_path), str(megabytes)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        seen.append(result.stdout.strip())
    assert set(seen) <= {"ModelLoadError", "ggml", bc.Model.available_kernels()}, seen
    assert "ggml" in seen, seen
    assert seen[-1] == bc.Model.available_kernels(), seen
