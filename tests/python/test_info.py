"""`batchcore info`, and what it is made of."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from batchcore import _core, _cpu


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "batchcore", "info", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_json_is_build_info_and_devices():
    found = json.loads(run("--json"))
    assert found["build"] == _core.build_info()
    assert [device["name"] for device in found["devices"]] == [d["name"] for d in _core.devices()]


def test_tables_name_the_essentials():
    text = run()
    build = _core.build_info()
    assert build["llama_cpp_commit"] in text
    assert re.search(r"backends +CPU", text)
    assert "GiB" in text


def test_build_info_is_complete():
    build = _core.build_info()
    assert build["version"] == _core.__version__
    assert re.fullmatch(r"[0-9a-f]{9}|unknown", build["llama_cpp_commit"])
    assert "CPU" in build["backends"]
    assert tuple(build["cpu_features"]) == _cpu.features
    assert build["kernels"] == _core.available_kernels()


def test_cpu_device_reports_its_memory():
    cpu = next(device for device in _core.devices() if device["type"] == "cpu")
    assert cpu["memory_total_bytes"] >= cpu["memory_free_bytes"] > 0
