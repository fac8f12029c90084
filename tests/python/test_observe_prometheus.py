"""Metrics for Prometheus: names, types, sums that add up, several engines, and engines that go."""

from __future__ import annotations

import bisect
import gc
import math
import sys
import urllib.request
from dataclasses import fields, replace
from pathlib import Path

import batchcore as bc
import prometheus_client
import pytest
from batchcore.errors import ConfigError
from batchcore.observe import EngineCollector, register
from batchcore.observe.families import FAMILIES, PREFIX, HistogramFamily, Reading
from batchcore.stats import EngineStats, Histogram, LatencyStats, PaddingStats, TierStats
from batchcore.testing import synthetic_gguf
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

DOC = Path(__file__).parents[2] / "docs" / "observability.md"
SHORT = bc.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

GAUGES = [
    "batch_fill_ratio",
    "batch_size_limit",
    "draining",
    "host_cache_bytes",
    "kv_cache_active_cells",
    "kv_cache_cached_cells",
    "kv_cache_cells",
    "kv_cache_usage_perc",
    "num_active_users",
    "num_pinned_prefixes",
    "num_requests_running",
    "num_requests_running_by_tier",
    "num_requests_waiting",
    "num_requests_waiting_by_tier",
    "padding_waste_ratio",
    "paused",
    "preempted_saved_bytes",
]
COUNTERS = [
    "attention_positions_total",
    "batch_size_changes_total",
    "computed_rows_total",
    "context_rebuilds_total",
    "decode_calls_total",
    "decode_failures_total",
    "decode_interrupts_total",
    "fair_share_service_tokens_total",
    "generation_tokens_total",
    "num_preemptions_for_slot_total",
    "num_preemptions_saved_total",
    "num_preemptions_total",
    "num_slot_moves_total",
    "prefix_cache_evictions_total",
    "prefix_cache_hits_total",
    "prefix_cache_host_hits_total",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "request_success_total",
    "requests_refused_total",
    "requests_shed_total",
    "static_slot_steps_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_draft_tokens_total",
    "step_seconds_total",
    "steps_total",
]
HISTOGRAMS = [
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "iteration_tokens_total",
    "request_queue_time_seconds",
    "time_to_first_token_seconds",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small enough that a request is a matter of milliseconds."""
    path = tmp_path_factory.mktemp("observe") / "tiny.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


def small(model, **options):
    return bc.Engine(model, **({"max_num_seqs": 2, "n_ctx": 512, "n_threads": 1} | options))


def scrape(registry):
    """What Prometheus reads, as (name, labels but model_name) -> value."""
    text = prometheus_client.generate_latest(registry).decode()
    return {
        (sample.name, *sorted(set(sample.labels.items()) - {("model_name", "tiny")})): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def no_stats(**values) -> EngineStats:
    """All zero."""
    none = Histogram((), 0.0)
    zeros = {field.name: 0 for field in fields(EngineStats)} | {
        "cost_s": (0.0, 0.0, 0.0, 0.0),
        "num_finished": {},
        "service": (),
        "tiers": (),
        "latencies": LatencyStats(none, none, none, none),
        "step_tokens": none,
        "padding": PaddingStats(0, 0, 0, 0, 0, 0, 0),
    }
    return EngineStats(**(zeros | values))


class FakeEngine:
    """Anything with `stats()`."""

    def __init__(self, stats: EngineStats | Exception) -> None:
        self.answer = stats

    def stats(self) -> EngineStats:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_real_run_read_back_from_the_exposition_text(smollm2, registry):
    with small(smollm2) as engine:
        register(engine, registry)
        seen = []
        for prompts in (["Once upon a time", "The sky is"], ["Once upon a time there"]):
            engine.generate(prompts, SHORT)
            stats = engine.stats()
            text = prometheus_client.generate_latest(registry).decode()
            seen.append({family.name: family for family in text_string_to_metric_families(text)})
    first, last = seen
    # The parser names counters without `_total`.
    kinds = {name: family.type for name, family in last.items()}
    assert kinds == {
        **{PREFIX + name: "gauge" for name in GAUGES},
        **{PREFIX + name.removesuffix("_total"): "counter" for name in COUNTERS},
        **{PREFIX + name: "histogram" for name in HISTOGRAMS},
    }
    assert text.count("# TYPE") == len(GAUGES + COUNTERS + HISTOGRAMS)
    for family in last.values():
        for sample in family.samples:
            assert sample.labels["model_name"] == Path(smollm2.path).stem
            assert sample.labels["engine"] == "0"
    for name, family in last.items():
        before, after = (
            {(one.name, *sorted(one.labels.items())): one.value for one in each.samples}
            for each in (first[name], family)
        )
        assert before.keys() == after.keys()
        if family.type != "gauge":
            assert all(after[key] >= value >= 0 for key, value in before.items())
    check_histograms(last, stats)
    values = scrape(registry)
    assert values == {}  # it is closed


def check_histograms(families, stats):
    expected = {
        "time_to_first_token_seconds": (stats.latencies.ttft, 3),
        "inter_token_latency_seconds": (stats.latencies.itl, 3 * 7),
        "e2e_request_latency_seconds": (stats.latencies.e2e, 3),
        "request_queue_time_seconds": (stats.latencies.queue, 3),
        "iteration_tokens_total": (stats.step_tokens, stats.num_steps),
    }
    assert sorted(expected) == HISTOGRAMS
    for name, (histogram, count) in expected.items():
        samples = families[PREFIX + name].samples
        buckets = [(float(one.labels["le"]), one.value) for one in samples if "le" in one.labels]
        assert buckets == sorted(buckets)
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        assert buckets[-1] == (math.inf, count)
        (total,) = [one.value for one in samples if one.name.endswith("_count")]
        (added,) = [one.value for one in samples if one.name.endswith("_sum")]
        assert total == count == histogram.count
        assert added == pytest.approx(histogram.sum)


def test_the_figures_are_those_of_the_engine(tiny, registry):
    policy = bc.SchedulingPolicy(tiers=[bc.Tier("paid", 0), bc.Tier("free", 1)])
    with small(tiny, max_num_seqs=1, autostart=False, policy=policy) as engine:
        register(engine, registry)
        done = engine.submit([5, 6, 7], SHORT, priority="paid")
        while engine.has_work:
            engine.step()
        running = engine.submit([5, 6, 7, 8], SHORT, priority="paid")
        waiting = [engine.submit([5], SHORT, priority=tier) for tier in ("free", 7, 9)]
        engine.step()
        stats, values = engine.stats(), scrape(registry)
        engine.pause()
        paused = scrape(registry)
    assert done.finished
    assert not running.finished
    assert len(waiting) == 3

    def value(name, **labels):
        return values[(PREFIX + name, *sorted({"engine": "0", **labels}.items()))]

    assert value("num_requests_running") == 1
    assert value("num_requests_waiting") == 3
    assert value("num_requests_running_by_tier", tier="paid") == 1
    assert value("num_requests_waiting_by_tier", tier="paid") == 0
    assert value("num_requests_waiting_by_tier", tier="free") == 1
    assert value("num_requests_waiting_by_tier", tier="other") == 2
    assert value("batch_fill_ratio") == 1
    assert value("batch_size_limit") == 1
    assert value("kv_cache_cells") == 512
    assert stats.num_active_cells > 0
    assert value("kv_cache_usage_perc") == stats.num_active_cells / 512
    assert value("prompt_tokens_total") == value("prefix_cache_queries_total") == 7
    assert value("prefix_cache_hits_total") == stats.num_cached_tokens > 0
    assert value("generation_tokens_total") == stats.num_generated_tokens
    assert value("request_success_total", finished_reason="length") == 1
    assert value("request_success_total", finished_reason="error") == 0
    assert value("step_seconds_total", phase="decode") == stats.decode_s > 0
    assert value("computed_rows_total", kind="decode") == stats.num_decode_rows
    assert value("paused") == 0
    assert paused[PREFIX + "paused", ("engine", "0")] == 1
    charged = [value("fair_share_service_tokens_total", user_bucket=str(i)) for i in range(16)]
    assert charged == list(stats.service)
    assert sum(charged) > 0


def test_every_name_is_said_here_and_in_the_documentation():
    names = sorted(f"{family.kind} {family.name}" for family in FAMILIES)
    assert names == sorted(
        [f"gauge {name}" for name in GAUGES]
        + [f"counter {name}" for name in COUNTERS]
        + [f"histogram {name}" for name in HISTOGRAMS]
    )
    table = [
        f"| `{family.name}` | {family.kind} "
        f"| {' '.join(f'`{label}`' for label in family.labels)} | {family.help.rstrip('.')} |"
        for family in FAMILIES
    ]
    rows = [" ".join(line.split()) for line in DOC.read_text().splitlines() if "| `" in line]
    assert [" ".join(row.split()) for row in table] == [
        row for row in rows if row.split(" | ")[1] in {"gauge", "counter", "histogram"}
    ]
    assert PREFIX == "batchcore:"


@given(
    st.sampled_from([each for each in FAMILIES if isinstance(each, HistogramFamily)]),
    st.lists(st.floats(0, 1e5) | st.integers(0, 20_000)),
)
def test_buckets_count_what_is_not_above_them(family, values):
    if family.name == "iteration_tokens_total":
        values = [int(value) for value in values]
    edges = Histogram.bounds()
    # Seconds on an edge count above it; clocks don't give such values.
    values = [value for value in values if isinstance(value, int) or value not in edges]
    if family.name != "iteration_tokens_total":
        values = [value for value in values if value not in edges]
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect.bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    while counts and not counts[-1]:
        counts.pop()  # as the engine does
    pairs = family.buckets.cumulative(Histogram(tuple(counts), float(sum(values))))
    assert [count for _, count in pairs] == [
        sum(value <= float(bound) for value in values) for bound, _ in pairs
    ]


def test_engines_share_a_registry_and_each_name_comes_once(tiny, registry):
    with small(tiny) as one, small(tiny) as two:
        register(one, registry)
        stop = register(two, registry, model_name="b", labels={"zone": "eu"})
        one.generate([[5, 6, 7]], SHORT)
        text = prometheus_client.generate_latest(registry).decode()
        assert text.count("# HELP") == len(FAMILIES)
        tokens = [line for line in text.splitlines() if line.startswith("batchcore:prompt_tokens")]
        assert tokens == [
            'batchcore:prompt_tokens_total{engine="0",model_name="tiny",zone=""} 3.0',
            'batchcore:prompt_tokens_total{engine="1",model_name="b",zone="eu"} 0.0',
        ]
        stop()
        assert 'engine="1"' not in prometheus_client.generate_latest(registry).decode()
        stop()  # no harm
        with pytest.raises(ConfigError, match="engine='0'"):
            register(two, registry, labels={"engine": "0"})
        register(two, registry, labels={"engine": "blue"})
        names = {key for sample in scrape(registry) for key in sample[1:] if key[0] == "engine"}
        assert names == {("engine", "0"), ("engine", "blue")}


def test_a_number_is_free_again_once_its_engine_is_closed(tiny, registry):
    with small(tiny) as first:
        register(first, registry)
    with small(tiny) as second:
        register(second, registry)
        assert (PREFIX + "steps_total", ("engine", "0")) in scrape(registry)


def test_a_registry_keeps_no_engine_alive(tiny, registry):
    engine = small(tiny)
    register(engine, registry)
    assert scrape(registry)
    del engine
    gc.collect()
    assert scrape(registry) == {}


def test_registries_are_not_kept_alive_either(tiny):
    from batchcore.observe.prometheus import _collectors

    gc.collect()
    before = len(_collectors)
    register(FakeEngine(no_stats()), prometheus_client.CollectorRegistry())
    gc.collect()
    assert len(_collectors) == before


async def _life_of(engine, registry):
    before = scrape(registry)
    async with engine:
        await engine.generate([5, 6, 7], SHORT)
        during = scrape(registry)
    return before, during, scrape(registry)


def test_an_async_engine_has_samples_while_it_is_loaded(tiny, registry):
    import asyncio

    engine = bc.AsyncEngine(tiny, max_num_seqs=2, n_ctx=512, n_threads=1)
    register(engine, registry)
    before, during, after = asyncio.run(_life_of(engine, registry))
    assert before == after == {}
    assert during[PREFIX + "generation_tokens_total", ("engine", "0")] == 8


def test_what_fails_is_left_out_and_logged(registry, caplog):
    good, bad = FakeEngine(no_stats(num_running=3)), FakeEngine(RuntimeError("broken"))
    register(bad, registry)
    register(good, registry, model_name="tiny")
    values = scrape(registry)
    assert values[PREFIX + "num_requests_running", ("engine", "1")] == 3
    assert not any(("engine", "0") in key for key in values)
    assert "broken" in caplog.text


def test_nothing_divides_by_zero_before_the_first_step():
    reading = Reading(no_stats(), {})
    for family in FAMILIES:
        if not isinstance(family, HistogramFamily):
            assert all(value == 0 for _, value in family.read(reading))


@pytest.mark.parametrize("name", ["le", "kind", "model_name", "__x", "1x", "a-b", ""])
def test_labels_that_would_break_the_text_are_refused(name):
    with pytest.raises(ConfigError, match="label"):
        EngineCollector(FakeEngine(no_stats()), labels={name: "x"})


def test_any_text_may_be_a_value_of_a_label(registry):
    tier = TierStats(priority=5, num_waiting=2, num_running=0)
    engine = FakeEngine(replace(no_stats(), tiers=(tier,)))
    register(engine, registry, model_name='a"b\n\udc80', labels={"zone": "\ud800"})
    text = prometheus_client.generate_latest(registry).decode()
    assert r'model_name="a\"b\n\\udc80"' in text
    labels = {key for sample in scrape(registry) for key in sample[1:]}
    assert ("zone", r"\ud800") in labels


def test_it_is_served_over_http(registry):
    engine = FakeEngine(no_stats(num_waiting=4))
    register(engine, registry)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert 'batchcore:num_requests_waiting{engine="0",model_name=""} 4.0' in text


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"batchcore\[metrics\]"):
        register(FakeEngine(no_stats()))
    with pytest.raises(ConfigError, match=r"batchcore\[metrics\]"):
        EngineCollector()
