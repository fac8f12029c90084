"""Spans of requests: names, attributes, times, parents, and how requests end."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import batchcore as bc
import pytest
from batchcore.errors import ConfigError, EngineClosedError, EngineError, RequestTimeoutError
from batchcore.observe import trace
from batchcore.testing import synthetic_gguf
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

SHORT = bc.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = bc.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
NAME = "text_completion tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small enough that a request is a matter of milliseconds."""
    path = tmp_path_factory.mktemp("observe") / "tiny.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


class Traces:
    """A provider that keeps its spans."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name):
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def traces():
    return Traces()


def small(model, **options):
    return bc.Engine(model, **({"max_num_seqs": 2, "n_ctx": 512, "n_threads": 1} | options))


def test_a_real_request_is_a_span_with_its_phases(smollm2, traces):
    params = bc.SamplingParams(
        max_tokens=8, temperature=0.5, top_p=0.9, top_k=40, seed=7, presence_penalty=0.25
    )
    with small(smollm2) as engine:
        trace(engine, traces.provider, model_name="smollm2")
        (output,) = engine.generate("Once upon a time", params, priority="interactive")
    (span,) = traces.named("text_completion smollm2")
    metrics = output.metrics
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "batchcore",
        "gen_ai.request.model": "smollm2",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.response.id": str(output.request_id),
        "gen_ai.response.finish_reasons": (output.outputs[0].finish_reason,),
        "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.output_tokens": len(output.outputs[0].token_ids),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.latency.e2e": metrics.latency_s,
        "gen_ai.latency.time_in_queue": metrics.queue_s,
        "gen_ai.latency.time_to_first_token": metrics.ttft_s,
        "batchcore.request.priority": "interactive",
        "batchcore.request.num_preemptions": 0,
    }
    assert span.kind is SpanKind.INTERNAL
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None
    assert span.instrumentation_scope.name == "batchcore"

    queue, prefill, decode = (traces.named(name)[0] for name in ("queue", "prefill", "decode"))
    for phase in (queue, prefill, decode):
        assert phase.parent.span_id == span.context.span_id
        assert phase.context.trace_id == span.context.trace_id
    marks = [span.start_time, queue.end_time, prefill.end_time, span.end_time]
    assert [queue.start_time, prefill.start_time, decode.start_time] == marks[:3]
    assert decode.end_time == span.end_time
    since_start = [(mark - span.start_time) / 1e9 for mark in marks[1:]]
    # Seconds since the epoch have a resolution of a quarter of a microsecond.
    expected = [metrics.queue_s, metrics.ttft_s, metrics.latency_s]
    assert since_start == pytest.approx(expected, abs=1e-6)


def test_the_parent_is_the_span_that_was_open_at_submit(tiny, traces):
    with small(tiny) as engine:
        trace(engine, traces.provider)
        with traces.tracer.start_as_current_span("submitting"):
            handle = engine.submit([5, 6, 7], SHORT)
        with traces.tracer.start_as_current_span("consuming"):
            handle.result()
    (parent,), (span,) = traces.named("submitting"), traces.named(NAME)
    assert span.parent.span_id == parent.context.span_id


def test_each_task_has_its_own_parent(tiny, traces):
    async def ask(engine, name):
        with traces.tracer.start_as_current_span(name):
            return await engine.generate([5, 6, 7], SHORT)

    async def ask_all():
        async with bc.AsyncEngine(tiny, max_num_seqs=2, n_ctx=512, n_threads=1) as engine:
            trace(engine, traces.provider)
            return await asyncio.gather(*(ask(engine, f"task {i}") for i in range(5)))

    outputs = asyncio.run(ask_all())
    spans = {span.attributes["gen_ai.response.id"]: span for span in traces.named(NAME)}
    for i, output in enumerate(outputs):
        (parent,) = traces.named(f"task {i}")
        assert spans[str(output.request_id)].parent.span_id == parent.context.span_id


def test_what_was_handed_in_before_has_no_parent(tiny, traces):
    with small(tiny) as engine:
        handle = engine.submit([5, 6, 7], SHORT)
        trace(engine, traces.provider)
        with traces.tracer.start_as_current_span("consuming"):
            handle.result()
    (span,) = traces.named(NAME)
    assert span.parent is None


def test_a_failure_is_an_error_with_its_exception(tiny, traces):
    engine = small(tiny)
    trace(engine, traces.provider)
    handle = engine.submit([5, 6, 7], LONG)
    engine.pause()
    waiting = engine.submit([5, 6, 7], LONG)
    engine.close()
    for each in (handle, waiting):
        with pytest.raises(EngineClosedError):
            each.result()
    for span in traces.named(NAME):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "EngineClosedError"
        assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
        (event,) = span.events
        assert event.name == "exception"
        assert event.timestamp == span.end_time
        assert event.attributes["exception.type"].endswith("EngineClosedError")
    assert len(traces.named(NAME)) == 2


def test_a_timeout_in_the_queue_has_a_queue_and_nothing_else(tiny, traces):
    with small(tiny) as engine:
        trace(engine, traces.provider)
        engine.pause()
        with pytest.raises(RequestTimeoutError):
            engine.generate([[5, 6, 7]], SHORT, timeout=0.05)
    (span,), (queue,) = traces.named(NAME), traces.named("queue")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "timeout"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("timeout",)
    assert (queue.start_time, queue.end_time) == (span.start_time, span.end_time)
    assert "gen_ai.latency.time_in_queue" not in span.attributes
    assert len(traces.exporter.get_finished_spans()) == 2


def test_cancelling_is_no_error(tiny, traces):
    with small(tiny, autostart=False) as engine:
        trace(engine, traces.provider)
        handle = engine.submit([5, 6, 7], LONG)
        engine.step()
        handle.cancel()
        while not handle.finished:
            engine.step()
    (span,) = traces.named(NAME)
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)


def test_a_dropped_handle_is_a_cancelled_request(tiny, traces):
    with small(tiny) as engine:
        trace(engine, traces.provider)
        engine.submit([5, 6, 7], LONG)
        (span,) = traces.named(NAME)
        assert span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
        assert span.end_time >= span.start_time
        assert len(traces.exporter.get_finished_spans()) == 1


def test_no_prompt_no_output_and_no_user_is_in_a_span(smollm2, traces):
    params = bc.SamplingParams(max_tokens=12, temperature=0, stop="never-to-come")
    with small(smollm2) as engine:
        trace(engine, traces.provider)
        (output,) = engine.generate("xylophones in Zanzibar", params, user="alice@example.org")
    text = "".join(span.to_json() for span in traces.exporter.get_finished_spans())
    assert output.text
    for secret in ("xylophone", "Zanzibar", output.text.strip(), "alice", "never-to-come"):
        assert secret not in text


def test_several_completions_and_a_seed_beyond_64_signed_bits(tiny, traces):
    params = bc.SamplingParams(max_tokens=4, ignore_eos=True, n=3, seed=2**64 - 1)
    with small(tiny, max_num_seqs=3) as engine:
        trace(engine, traces.provider)
        engine.generate([[5, 6, 7]], params)
    (span,) = traces.named(NAME)
    assert span.attributes["gen_ai.request.choice.count"] == 3
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",) * 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 12
    assert "gen_ai.request.seed" not in span.attributes


def test_phases_may_be_left_out_and_tracing_stopped(tiny, traces):
    with small(tiny) as engine:
        stop = trace(engine, traces.provider, phases=False)
        engine.generate([[5, 6, 7]], SHORT)
        stop()
        engine.generate([[5, 6, 7]], SHORT)
    (span,) = traces.exporter.get_finished_spans()
    assert span.name == NAME


def test_context_is_captured_only_where_somebody_observes(tiny):
    events = []
    with small(tiny) as engine:
        assert engine.submit([5], SHORT)._context is None
        engine.add_observer(events.append)
        handle = engine.submit([5], SHORT)
        assert handle._context is not None
        handle.result()
        assert handle._context is None
    assert events[-1].context is not None


def test_the_global_provider_is_the_default(tiny):
    with small(tiny) as engine:
        trace(engine)  # which does nothing where nobody has set one
        engine.generate([[5, 6, 7]], SHORT)


def test_an_engine_that_is_not_loaded_can_not_be_traced(tiny, traces):
    with pytest.raises(EngineError, match="not loaded"):
        trace(bc.AsyncEngine(tiny), traces.provider)


def test_without_the_package_the_error_names_the_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with small(tiny) as engine, pytest.raises(ConfigError, match=r"batchcore\[tracing\]"):
        trace(engine)


def test_importing_it_imports_no_optional_package():
    code = (
        "import sys, batchcore.observe\n"
        "assert not {'prometheus_client', 'opentelemetry'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
