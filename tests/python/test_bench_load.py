"""Workloads over a real engine: what is recorded, and that nothing is left behind."""

from __future__ import annotations

import _thread
import json
import signal

import batchcore as bc
import pytest
from batchcore.bench import Slo, Workload, WorkloadRequest, run_load
from batchcore.bench.load import _Watch
from batchcore.errors import ConfigError

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(smollm2):
    # One thread: several would wait for each other where the machine has other things to do too.
    options = {"max_num_seqs": 2, "n_ctx": 512, "n_threads": 1}
    with bc.Engine(smollm2, max_queued_requests=3, **options) as engine:
        yield engine
        stats = engine.stats()
        assert stats.num_running == stats.num_waiting == 0


def requests_of(*counts, **values):
    return [
        WorkloadRequest(f"Number {index}", bc.SamplingParams(max_tokens=count, **GREEDY), **values)
        for index, count in enumerate(counts)
    ]


def test_every_request_is_run_and_recorded(engine):
    counts = [4, 1, 3]
    first, second, third = requests_of(*counts, user="u", group="g")
    workload = Workload(
        (
            WorkloadRequest(first.prompt, first.params, arrival_s=0.06, user="u", group="g"),
            second,
            WorkloadRequest(third.prompt, third.params, arrival_s=0.03, user="u", group="g"),
        )
    )
    before = engine.stats().num_generated_tokens
    seen = []
    result = run_load(engine, workload, on_record=seen.append)
    assert engine.stats().num_generated_tokens - before == sum(counts)
    assert (result.num_requests, result.interrupted) == (3, False)
    assert [record.index for record in result.records] == [0, 1, 2]
    assert sorted(seen, key=lambda record: record.index) == result.records
    for request, record in zip(workload, result.records, strict=True):
        assert record.completion_tokens == (request.params.max_tokens,)
        assert len(record.itl_s) == request.params.max_tokens - 1
        assert record.due_s == record.arrival_s == request.arrival_s
        assert record.lag_s >= 0
        assert 0 < record.ttft_s <= record.latency_s
        assert record.ttft_s + sum(record.itl_s) <= record.latency_s + 1e-9
        assert record.due_s + record.latency_s <= result.total_s
        assert (record.finish_reason, record.error) == ("length", None)
        assert (record.user, record.group) == ("u", "g")
        output = result.outputs[record.index]
        assert output.prompt_token_ids == engine.tokenize(request.prompt)
        assert record.num_prompt_tokens == len(output.prompt_token_ids)
        assert len(output.outputs[0].token_ids) == request.params.max_tokens
    summary = result.summarize(Slo(ttft_ms=1e6))
    assert (summary.num_completed, summary.num_good, summary.num_output_tokens) == (3, 3, 8)
    assert len(json.loads(json.dumps(result.to_dict()))["requests"]) == 3


def test_refused_requests_are_recorded_and_the_others_go_on(engine):
    # All at once: two run, and the queue holds three.
    bad = (WorkloadRequest((10**6,)), WorkloadRequest(""))
    result = run_load(engine, Workload((*bad, *requests_of(*[8] * 30))))
    assert [record.index for record in result.records] == list(range(32))
    errors = [record.error for record in result.records]
    assert errors[:2] == ["InvalidRequestError", "InvalidRequestError"]
    assert "1000000 is not in the vocabulary" in result.records[0].error_message
    assert errors[2:5] == [None, None, None]
    assert set(errors[5:]) <= {None, "QueueFullError"}
    assert "QueueFullError" in errors
    for record in result.records:
        if record.error is not None:
            assert record.ttft_s is record.latency_s is record.finish_reason is None
            assert record.completion_tokens == ()
            assert record.index not in result.outputs
    summary = result.summarize()
    assert summary.num_completed == errors.count(None)
    assert summary.errors == {
        "InvalidRequestError": 2,
        "QueueFullError": errors.count("QueueFullError"),
    }
    assert summary.num_output_tokens == 8 * summary.num_completed


def test_max_concurrency_holds_requests_back(engine):
    # Seven at once would not fit into the queue.
    result = run_load(engine, Workload(tuple(requests_of(*[3] * 7))), max_concurrency=1)
    assert [record.error for record in result.records] == [None] * 7
    assert result.records[0].due_s == 0.0
    for before, after in zip(result.records, result.records[1:], strict=False):
        assert after.arrival_s == 0.0
        assert after.due_s >= before.due_s + before.latency_s


def test_cached_prefixes_are_counted(engine):
    prompt = tuple(engine.tokenize("The quick brown fox jumps over the lazy dog " * 4))
    params = bc.SamplingParams(max_tokens=1, **GREEDY)
    result = run_load(engine, Workload((WorkloadRequest(prompt, params),) * 2), max_concurrency=1)
    assert [record.num_cached_tokens for record in result.records] == [0, len(prompt) - 1]
    assert result.summarize().num_cached_tokens == len(prompt) - 1


def test_a_timeout_is_recorded(engine):
    result = run_load(engine, Workload(tuple(requests_of(400))), timeout=0.1)
    (record,) = result.records
    assert (record.finish_reason, record.error) == ("timeout", None)
    assert record.num_output_tokens < 400
    assert result.summarize().errors == {"timeout": 1}


def test_a_closed_engine_is_recorded_and_a_stepped_one_refused(smollm2):
    options = {"max_num_seqs": 1, "n_ctx": 64, "n_threads": 1}
    stepped = bc.Engine(smollm2, autostart=False, **options)
    with stepped, pytest.raises(ConfigError, match="autostart"):
        run_load(stepped, Workload(tuple(requests_of(1))))
    closed = bc.Engine(smollm2, **options)
    closed.close()
    result = run_load(closed, Workload(tuple(requests_of(1))))
    assert [record.error for record in result.records] == ["EngineClosedError"]


def test_misuse_is_refused(engine):
    workload = Workload(())
    with pytest.raises(ConfigError, match="max_concurrency must be at least 1"):
        run_load(engine, workload, max_concurrency=0)
    with pytest.raises(ConfigError, match="timeout must be above 0"):
        run_load(engine, workload, timeout=0)
    assert run_load(engine, workload).records == []


def test_an_error_of_the_caller_ends_the_run(engine):
    def on_record(record):
        raise KeyError(record.index)

    late = WorkloadRequest("never", arrival_s=1000.0)
    with pytest.raises(KeyError):
        run_load(engine, Workload((*requests_of(1, 300), late)), on_record=on_record)


@pytest.fixture
def sigint_is_handled():
    # A shell starts a background job with SIGINT ignored, and Python then leaves it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_is_handled")
def test_ctrl_c_returns_what_there_was(engine):
    late = WorkloadRequest("never", arrival_s=1000.0)
    workload = Workload((*requests_of(2, 400), late))
    result = run_load(engine, workload, on_record=lambda record: _thread.interrupt_main())
    assert result.interrupted
    assert result.num_requests == 3
    done, cut_off = result.records
    assert (done.index, done.finish_reason, done.completion_tokens) == (0, "length", (2,))
    assert (cut_off.index, cut_off.finish_reason, cut_off.latency_s) == (1, None, None)
    assert cut_off.num_output_tokens < 400
    assert not cut_off.is_completed
    assert result.total_s < 1000
    assert result.summarize().errors == {"none": 1}


def test_gaps_are_those_between_tokens_of_one_completion():
    watch = _Watch(0, WorkloadRequest("a", arrival_s=1.0), 1.0, submitted_s=1.5)
    watch.take(0, 0, 2.0)
    watch.take(0, 1, 3.0)
    watch.take(1, 2, 4.0)
    watch.take(0, 3, 5.0)
    watch.take(1, 1, 4.25)
    watch.ended_s = 6.0
    record = watch.record()
    assert record.ttft_s == 2.0
    assert record.itl_s == (0.0, 2.0, 0.0, 0.0, 0.25)
    assert (record.latency_s, record.lag_s) == (5.0, 0.5)
