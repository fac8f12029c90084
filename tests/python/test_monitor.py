"""Sampling: columns, summaries, what is missing, and that a failing source never ends a run."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from batchcore import EngineStats
from batchcore.bench import monitor as monitor_module
from batchcore.bench.model_cost import ModelCost
from batchcore.bench.monitor import ColumnSummary, Monitor, MonitorResult
from batchcore.bench.monitor_probes import Gpus, engine_probe, process_probes, read_cost
from batchcore.engine import Engine
from batchcore.errors import ConfigError, EngineError
from batchcore.params import SamplingParams

NAN = math.nan


def stats(**values) -> EngineStats:
    unset = {"cost_s": (0.0, 0.0, 0.0, 0.0), "num_finished": {}}
    zeros = {field.name: unset.get(field.name, 0) for field in fields(EngineStats)}
    return EngineStats(**(zeros | values))


class FakeEngine:
    """Gives the same counters, or those that follow one another."""

    def __init__(self, *each: EngineStats) -> None:
        self.calls = itertools.chain(each, itertools.repeat(each[-1]))

    def stats(self) -> EngineStats:
        return next(self.calls)


class FakeCost:
    """1,000 bytes of weights, 400 of them a head, and 2 bytes per token of context."""

    def weight_bytes(self, rows: int = 1, *, outputs: int | None = None) -> float:
        return 600 if outputs == 0 else 1000 + rows

    def context_bytes(self, context_tokens: float) -> float:
        return 2 * context_tokens


class FakeNvml(SimpleNamespace):
    """Two GPUs; the second has no power reading. Records whose PCIe rates were asked for."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1

    def __init__(self, num_gpus: int = 2) -> None:
        super().__init__()
        self.num_gpus = num_gpus
        self.is_open = False
        self.pcie_asked: list[str] = []
        self.failing: set[str] = set()

    def nvmlInit(self):  # noqa: N802
        self.is_open = True

    def nvmlShutdown(self):  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self):  # noqa: N802
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return f"device{index}"

    def nvmlDeviceGetName(self, device):  # noqa: N802
        return f"Fake {device}".encode()

    def nvmlDeviceGetUtilizationRates(self, device):  # noqa: N802
        if "utilisation" in self.failing:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(gpu=97, memory=60)

    def nvmlDeviceGetMemoryInfo(self, device):  # noqa: N802
        return SimpleNamespace(used=5 << 30)

    def nvmlDeviceGetPowerUsage(self, device):  # noqa: N802
        if device == "device1":
            raise RuntimeError("Not Supported")
        return 312_500

    def nvmlDeviceGetClockInfo(self, device, kind):  # noqa: N802
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPcieThroughput(self, device, counter):  # noqa: N802
        self.pcie_asked.append(device)
        return {0: 11, 1: 22}[counter]


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def wait_for_samples(monitor: Monitor, count: int) -> None:
    while len(monitor.result()) < count:
        time.sleep(0.001)


def result_of(**columns) -> MonitorResult:
    return MonitorResult(
        columns={name: np.array(values, float) for name, values in columns.items()},
        start_s=5.0,
        interval_s=0.1,
        gpus=["A"],
        missing={"process": "why"},
        errors={"x": 2},
        first_errors={"x": "ValueError: no"},
    )


# -- the engine's counters ------------------------------------------------------------------------


def test_engine_columns_are_the_engines_counters():
    probe = engine_probe(FakeEngine(stats(num_running=3, num_waiting=4, decode_s=0.5)), None)
    values = dict(zip(probe.columns, probe.read(), strict=True))
    assert values["num_running"] == 3
    assert values["num_waiting"] == 4
    assert values["decode_s"] == 0.5
    assert values["num_generated_tokens"] == 0
    assert "read_bytes" not in values


def test_read_bytes_are_weights_per_call_and_context_per_decoded_row():
    engine = FakeEngine(
        stats(num_micro_batches=100, num_rows=900),  # before the first sample: not counted
        stats(
            num_micro_batches=103,
            num_rows=912,
            num_generated_tokens=20,
            num_decode_rows=8,
            num_running=4,
            num_active_cells=40,
        ),
        stats(
            num_micro_batches=104,
            num_rows=913,
            num_generated_tokens=20,  # a chunk of a prompt: no logits
            num_decode_rows=8,
            num_running=4,
            num_active_cells=60,
        ),
        stats(
            num_micro_batches=105,
            num_rows=917,
            num_generated_tokens=24,
            num_decode_rows=12,
            num_running=2,
            num_active_cells=50,
        ),
    )
    probe = engine_probe(engine, FakeCost())
    total = [probe.read()[probe.columns.index("read_bytes")] for _ in range(5)]
    first = 3 * 1004 + 8 * 2 * 10  # three calls of four rows, contexts of ten
    second = 600
    third = 1004 + 4 * 2 * 20  # contexts of 15 before and 25 after
    assert total == [0, first, first + second, first + second + third, first + second + third]


def test_the_cost_is_read_from_the_engines_file(tmp_path):
    from batchcore.testing import synthetic_gguf

    path = synthetic_gguf(tmp_path / "m.gguf")
    model = SimpleNamespace(path=str(path), size_bytes=1)
    assert read_cost(SimpleNamespace(model=model)) == (ModelCost.from_gguf(path), None)
    # an AsyncEngine has its engine under `engine`
    assert read_cost(SimpleNamespace(engine=SimpleNamespace(model=model)))[1] is None


def test_without_gguf_the_size_of_the_model_is_the_cost(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = SimpleNamespace(path="m.gguf", size_bytes=1234)
    cost, problem = read_cost(SimpleNamespace(model=model))
    assert cost is not None
    assert cost.weight_bytes(8, outputs=0) == 1234
    assert cost.context_bytes(100) == 0
    assert problem is not None
    assert "pip install 'batchcore[lab]'" in problem


def test_an_engine_that_is_not_loaded_has_no_cost():
    class NotLoaded:
        @property
        def engine(self):
            raise EngineError("not loaded yet")

    assert read_cost(NotLoaded()) == (None, "the engine has no model: not loaded yet")


# -- this process ---------------------------------------------------------------------------------


def test_process_columns_come_from_psutil():
    probes, problem = process_probes()
    assert problem is None
    first, second = (
        {name: value for p in probes for name, value in zip(p.columns, p.read(), strict=True)}
        for _ in range(2)
    )
    assert list(first) == ["process_cpu_percent", "system_cpu_percent", "process_rss_bytes"]
    # The first call of psutil has no time to average over.
    assert math.isnan(first["process_cpu_percent"])
    assert math.isnan(first["system_cpu_percent"])
    assert second["process_cpu_percent"] >= 0
    assert 0 <= second["system_cpu_percent"] <= 100
    assert second["process_rss_bytes"] > 10e6


def test_without_psutil_the_extra_is_named(monkeypatch, no_nvml):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with Monitor() as monitor:
        pass
    assert monitor.missing["process"] == (
        "psutil is not installed: pip install 'batchcore[monitor]'"
    )
    assert list(monitor.result().columns) == ["time_s"]


# -- GPUs -----------------------------------------------------------------------------------------


def test_gpu_columns_have_units_of_their_names(monkeypatch):
    nvml = FakeNvml(num_gpus=1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Monitor() as monitor:
        assert nvml.is_open
    result = monitor.result()
    assert not nvml.is_open
    assert monitor.why_no_gpu is None
    assert result.gpus == ["Fake device0"]
    values = {name: result[name][-1] for name in result.columns if name.startswith("gpu")}
    assert values == {
        "gpu0_utilisation_percent": 97,
        "gpu0_memory_busy_percent": 60,
        "gpu0_memory_used_bytes": 5 << 30,
        "gpu0_power_w": 312.5,
        "gpu0_sm_clock_mhz": 1980,
        "gpu0_memory_clock_mhz": 2619,
        "gpu0_pcie_tx_bytes_per_s": 11_000,
        "gpu0_pcie_rx_bytes_per_s": 22_000,
    }


def test_what_a_gpu_does_not_have_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    gpus = Gpus()
    columns = [column for probe in gpus.probes for column in probe.columns]
    assert "gpu0_power_w" in columns
    assert "gpu1_power_w" not in columns
    assert gpus.unsupported == {"gpu1_power_w": "Not Supported"}
    gpus.close()


def test_only_the_gpus_asked_for_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    gpus = Gpus([1])
    assert gpus.names == ["Fake device1"]
    gpus.close()


def test_pcie_rates_are_read_of_one_gpu_at_a_time(monkeypatch):
    # Each takes 40 ms, so that several per sample would miss the rate of sampling.
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpus = Gpus()
    probe = gpus.probes[-1]
    nvml.pcie_asked.clear()
    assert list(probe.read())[:2] == [11_000, 22_000]
    assert np.isnan(probe.read()).sum() == 0
    assert nvml.pcie_asked == ["device0"] * 2 + ["device1"] * 2
    gpus.close()


def test_without_the_package_the_extra_is_named(no_nvml):
    with Monitor() as monitor:
        pass
    assert monitor.why_no_gpu == ("nvidia-ml-py is not installed: pip install 'batchcore[nvml]'")
    assert not [name for name in monitor.result().columns if name.startswith("gpu")]


def test_without_a_driver_the_reason_is_kept(monkeypatch):
    nvml = FakeNvml()

    def fail():
        raise RuntimeError("NVML Shared Library Not Found")

    nvml.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Monitor() as monitor:
        pass
    assert monitor.why_no_gpu == "no NVIDIA driver: NVML Shared Library Not Found"
    assert monitor.result().errors == {}


def test_a_driver_without_gpus_is_closed_again(monkeypatch):
    nvml = FakeNvml(num_gpus=0)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Monitor() as monitor:
        pass
    assert monitor.why_no_gpu == "NVML shows no GPU that can be read"
    assert not nvml.is_open


def test_a_gpu_that_is_lost_does_not_end_the_run(monkeypatch):
    nvml = FakeNvml(num_gpus=1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Monitor(interval_s=0.001) as monitor:
        num_good = len(monitor.result())
        nvml.failing.add("utilisation")
        wait_for_samples(monitor, num_good + 3)
    result = monitor.result()
    assert result.errors["gpu0_utilisation_percent"] >= 2
    assert result.first_errors["gpu0_utilisation_percent"] == "RuntimeError: GPU is lost"
    assert result["gpu0_utilisation_percent"][0] == 97
    assert math.isnan(result["gpu0_utilisation_percent"][-1])
    assert result["gpu0_sm_clock_mhz"][-1] == 1980


# -- sampling -------------------------------------------------------------------------------------


def test_samples_go_on_until_the_end_and_have_the_time(no_nvml):
    with Monitor(FakeEngine(stats(num_running=2)), interval_s=0.001) as monitor:
        assert len(monitor.result()) >= 1  # the first one is there before the run begins
        wait_for_samples(monitor, 5)
    result = monitor.result()
    assert len(result) >= 6
    assert result["time_s"][0] >= 0
    assert (np.diff(result["time_s"]) > 0).all()
    assert result.duration_s == result["time_s"][-1] - result["time_s"][0]
    assert (result["num_running"] == 2).all()
    assert len({len(values) for values in result.columns.values()}) == 1
    before = time.perf_counter()
    assert result.start_s + result["time_s"][-1] <= before
    assert len(monitor.stop()) == len(result)  # nothing is sampled after the end


def test_an_engine_that_fails_is_counted(no_nvml):
    class Failing:
        def stats(self):
            raise EngineError("gone")

    with Monitor(Failing(), interval_s=0.001, cost=FakeCost()) as monitor:
        wait_for_samples(monitor, 3)
    result = monitor.result()
    assert result.errors == {"num_running": len(result)}
    assert result.first_errors == {"num_running": "EngineError: gone"}
    assert np.isnan(result["num_running"]).all()
    assert result.summary["num_running"] == ColumnSummary(mean=None, max=None, change=None)
    assert result.summary["process_rss_bytes"].max > 0


def test_an_error_of_the_run_comes_through(no_nvml):
    with pytest.raises(ZeroDivisionError), Monitor() as monitor:
        _ = 1 / 0
    assert len(monitor.result()) >= 2


def test_a_monitor_is_good_for_one_run(no_nvml):
    with Monitor() as monitor:
        pass
    with pytest.raises(ConfigError, match="one run"):
        monitor.start()


@pytest.mark.parametrize("interval_s", [0, -1, NAN, math.inf])
def test_intervals_are_above_zero(interval_s):
    with pytest.raises(ConfigError, match="interval_s"):
        Monitor(interval_s=interval_s)


def test_a_monitor_that_was_not_started_has_no_samples():
    result = Monitor().stop()
    assert len(result) == 0
    assert result.duration_s == result.max_gap_s == 0
    assert result.summary == {}
    assert result.to_dict()["columns"] == {"time_s": []}


# -- results --------------------------------------------------------------------------------------


def test_means_are_over_time():
    # 10 for one second, 20 for three.
    result = result_of(time_s=[0, 1, 4], load=[99, 10, 20], gaps=[NAN, 5, NAN], none=[NAN] * 3)
    assert result.summary == {
        "load": ColumnSummary(mean=17.5, max=99, change=-79),
        "gaps": ColumnSummary(mean=5, max=5, change=0),
        "none": ColumnSummary(mean=None, max=None, change=None),
    }
    assert result.duration_s == 4
    assert result.max_gap_s == 3


def test_one_sample_is_its_own_mean():
    assert result_of(time_s=[0], load=[7]).summary["load"] == ColumnSummary(7, 7, 0)


def test_rates_are_growth_over_time():
    columns = monitor_module._with_rates(
        {
            "time_s": np.array([0.0, 1.0, 3.0, 4.0]),
            "num_generated_tokens": np.array([5.0, 15.0, 15.0, 45.0]),
            "read_bytes": np.array([0.0, 100.0, 100.0, 700.0]),
            "decode_s": np.array([2.0, 2.5, 2.5, 3.5]),
        }
    )
    np.testing.assert_equal(columns["generated_tokens_per_s"], [NAN, 10, 0, 30])
    np.testing.assert_equal(columns["read_bytes_per_s"], [NAN, 100, 0, 600])
    # No call ended in the second interval.
    np.testing.assert_equal(columns["decode_read_bytes_per_s"], [NAN, 200, NAN, 600])
    summary = result_of(**columns).summary
    assert summary["generated_tokens_per_s"].mean == 40 / 4
    assert summary["read_bytes_per_s"].mean == 700 / 4
    assert summary["decode_read_bytes_per_s"].mean == pytest.approx(700 / 1.5)


def test_results_become_json():
    values = result_of(time_s=[0, 2], load=[NAN, 3]).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == {
        "start_s": 5.0,
        "interval_s": 0.1,
        "num_samples": 2,
        "duration_s": 2.0,
        "max_gap_s": 2.0,
        "gpus": ["A"],
        "missing": {"process": "why"},
        "errors": {"x": 2},
        "first_errors": {"x": "ValueError: no"},
        "summary": {"load": {"mean": 3.0, "max": 3.0, "change": 0.0}},
        "columns": {"time_s": [0.0, 2.0], "load": [None, 3.0]},
    }


@pytest.mark.model
def test_a_real_run(smollm2, smollm2_path, no_nvml):
    cost = ModelCost.from_gguf(smollm2_path)
    with Engine(smollm2, max_num_seqs=4, n_ctx=512) as engine:
        with Monitor(engine, interval_s=0.01) as monitor:
            engine.generate(["One, two,"] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
        counted = engine.stats()
    result = monitor.result()
    assert result.errors == {}
    assert set(result.missing) == {"gpu"}
    assert result["num_generated_tokens"][-1] == counted.num_generated_tokens == 32
    assert result["num_micro_batches"][-1] == counted.num_micro_batches
    assert result["num_running"].max() >= 1
    assert (np.diff(result["num_rows"]) >= 0).all()
    # Weights for each call, the head included or not, and at most 20 tokens of context per row.
    num_bytes, calls = result.summary["read_bytes"].change, counted.num_micro_batches
    most = calls * cost.weight_bytes(1) + counted.num_decode_rows * cost.context_bytes(20)
    assert calls * cost.layer_bytes <= num_bytes <= most
    assert result.summary["decode_read_bytes_per_s"].mean > 0
    json.dumps(result.to_dict(), allow_nan=False)
