"""A CPU that lacks what the build uses is an ImportError, before anything can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from batchcore import _cpu

MAPS = Path("/proc/self/maps")
CPUINFO = Path("/proc/cpuinfo")


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not _cpu.features, reason="built without features that are checked")
def test_missing_cpu_feature_is_an_import_error_with_the_remedy():
    feature = _cpu.features[-1]
    result = run("import batchcore", BATCHCORE_TEST_MISSING_FEATURE=feature)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: batchcore was built for CPUs with {feature},")
    assert "BATCHCORE_PORTABLE=ON" in last


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
@pytest.mark.skipif(not _cpu.features, reason="built without features that are checked")
def test_core_is_not_even_loaded_when_a_feature_is_missing():
    """Its static initialisers may already hold instructions that this CPU lacks."""
    code = f"""
        from pathlib import Path
        try:
            import batchcore._core
        except ImportError:
            print("/_core." in Path("{MAPS}").read_text(), "/_cpu." in Path("{MAPS}").read_text())
    """
    result = run(textwrap.dedent(code), BATCHCORE_TEST_MISSING_FEATURE=_cpu.features[0])
    assert result.stdout.split() == ["False", "True"]


def test_another_missing_feature_does_not_matter():
    assert run("import batchcore", BATCHCORE_TEST_MISSING_FEATURE="no_such_feature").returncode == 0


@pytest.mark.skipif(not CPUINFO.exists() or not _cpu.features, reason="needs /proc and x86")
def test_features_are_in_cpuinfo():
    """The build believed in nothing that the kernel does not list."""
    lines = CPUINFO.read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    names = {"sse4.2": "sse4_2", "avx512": "avx512f", "avx512_vbmi": "avx512vbmi"}
    assert [feature for feature in _cpu.features if names.get(feature, feature) not in flags] == []
