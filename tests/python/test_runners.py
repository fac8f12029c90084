"""The three ways to run prompts: what they count, in which order they run, how they end."""

from __future__ import annotations

import _thread
import math
import signal
from itertools import pairwise

import batchcore as bc
import numpy as np
import pytest
from batchcore import prompts
from batchcore.bench.runners import (
    RequestResult,
    RunResult,
    percentile,
    run_continuous,
    run_sequential,
    run_static,
    spread_max_tokens,
    warm_up,
)
from batchcore.errors import ConfigError, InvalidRequestError
from hypothesis import given
from hypothesis import strategies as st

# The first token of each is a clear choice, twice as likely as any other or more.
TEXTS = [
    "The sky is",
    "One, two, three,",
    "The capital of France is",
    "import numpy as",
    "In winter",
]
COUNTS = [6, 2, 4, 3, 5]
PARAMS = [bc.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in COUNTS]


@pytest.fixture(scope="module")
def engine(smollm2):
    # One thread: several would wait for each other where the machine has other things to do too.
    options = {"max_num_seqs": 2, "n_ctx": 512, "n_threads": 1, "prefix_caching": False}
    with bc.Engine(smollm2, **options) as engine:
        warm_up(engine, TEXTS)
        yield engine


def run_mode(mode, engine, on_delta=None):
    if mode == "static":
        return run_static(engine, TEXTS, PARAMS, batch_size=2, on_delta=on_delta)
    run = {"sequential": run_sequential, "continuous": run_continuous}[mode]
    return run(engine, TEXTS, PARAMS, on_delta=on_delta)


@pytest.mark.parametrize("mode", ["sequential", "static", "continuous"])
def test_every_prompt_is_run_once_and_counted_exactly(engine, mode):
    before = engine.stats().num_generated_tokens
    pieces: dict[int, str] = {}
    result = run_mode(
        mode, engine, lambda index, d: pieces.__setitem__(index, pieces.get(index, "") + d.text)
    )
    assert (result.mode, result.interrupted) == (mode, False)
    assert [request.index for request in result.requests] == list(range(len(TEXTS)))
    assert [request.num_output_tokens for request in result.requests] == COUNTS
    assert result.num_output_tokens == sum(COUNTS)
    assert engine.stats().num_generated_tokens - before == sum(COUNTS)
    for request, text in zip(result.requests, TEXTS, strict=True):
        assert request.output.prompt_token_ids == engine.tokenize(text)
        assert request.output.text == pieces[request.index]
        assert request.output.num_cached_tokens == 0
        assert 0 < request.ttft_s <= request.latency_s <= result.total_s
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_modes_differ_in_when_requests_start(engine):
    def overlaps(mode):
        """Prompts whose tokens came while another one was running."""
        open_, seen = set(), []

        def on_delta(index, delta):
            open_.add(index)
            seen.append(frozenset(open_))
            if delta.finish_reason:
                open_.remove(index)

        run_mode(mode, engine, on_delta)
        return {group for group in seen if len(group) > 1}

    assert overlaps("sequential") == set()
    assert overlaps("static") <= {frozenset({0, 1}), frozenset({2, 3})}
    # Prompt 1 has 2 tokens and prompt 0 has 6: the slot is refilled while prompt 0 goes on.
    assert frozenset({0, 2}) in overlaps("continuous")


def test_sequential_latencies_include_waiting(engine):
    latencies = run_mode("sequential", engine).latencies_s
    assert all(one < two for one, two in pairwise(latencies))


def test_outputs_agree_between_modes(engine):
    by_mode = [run_mode(mode, engine) for mode in ("sequential", "static", "continuous")]
    firsts = [
        [request.output.outputs[0].token_ids[0] for request in result.requests]
        for result in by_mode
    ]
    # Later tokens may part where two are equally likely up to rounding.
    assert firsts[0] == firsts[1] == firsts[2]


@pytest.fixture
def sigint_is_handled():
    # A shell starts a background job with SIGINT ignored, and Python then leaves it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_is_handled")
def test_ctrl_c_returns_what_was_finished(engine):
    def on_delta(index, delta):
        if index == 2:
            _thread.interrupt_main()

    result = run_mode("sequential", engine, on_delta)
    assert result.interrupted
    assert result.num_requests == 5
    assert [request.index for request in result.requests] in ([0, 1], [0, 1, 2])
    assert result.total_s >= max(result.latencies_s)
    assert len(run_mode("sequential", engine).requests) == 5  # nothing was left behind


def test_a_request_that_fails_ends_the_run_and_leaves_nothing_behind(engine):
    with pytest.raises(InvalidRequestError):
        run_continuous(engine, [*TEXTS, [10**9]], bc.SamplingParams(max_tokens=100))
    assert engine.generate("Hello", bc.SamplingParams(max_tokens=1))[0].finished
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_static_batches_may_be_cut_by_length(engine):
    lengths = [len(engine.tokenize(text)) for text in TEXTS]
    started: list[int] = []
    run_static(
        engine,
        TEXTS,
        PARAMS,
        batch_size=2,
        bucketing="sorted",
        on_delta=lambda index, _: started.append(index) if index not in started else None,
    )
    order = sorted(range(len(TEXTS)), key=lambda index: lengths[index])
    assert [set(started[:2]), set(started[2:4]), set(started[4:])] == [
        set(order[:2]),
        set(order[2:4]),
        set(order[4:]),
    ]


def test_misuse_is_refused(engine):
    with pytest.raises(ConfigError, match="batch_size"):
        run_static(engine, TEXTS, batch_size=0)
    with pytest.raises(InvalidRequestError, match="1 sets of parameters for 5"):
        run_sequential(engine, TEXTS, PARAMS[:1])
    assert run_continuous(engine, []).requests == []


def result_of(*latencies):
    def request(index, latency):
        completion = bc.CompletionOutput(0, token_ids=[1, 2, 3])
        return RequestResult(index, bc.RequestOutput(index, [7], [completion]), 0.1, latency)

    requests = [request(index, latency) for index, latency in enumerate(latencies)]
    return RunResult("static", len(requests), requests, total_s=2.0)


def test_totals():
    result = result_of(1.0, 2.0)
    assert (result.num_output_tokens, result.output_tokens_per_s) == (6, 3.0)
    assert (result.mean_latency_s, result.latency_percentile_s(50)) == (1.5, 1.5)
    data = result.to_dict()
    assert data["latency_s"] == pytest.approx({"mean": 1.5, "p50": 1.5, "p95": 1.95, "p99": 1.99})
    assert data["requests"][0]["completions"][0]["token_ids"] == [1, 2, 3]
    nothing = result_of()
    assert math.isnan(nothing.mean_latency_s)
    assert nothing.to_dict()["latency_s"]["p95"] is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


@given(st.integers(1, 500), st.integers(1, 200))
def test_spread_stays_in_its_range(max_tokens, count):
    spread = spread_max_tokens(max_tokens, count)
    assert len(spread) == count
    assert max(spread) == spread[0] == max_tokens
    assert min(spread) >= max(1, max_tokens // 4)
    assert spread_max_tokens(max_tokens, count + 1)[:count] == spread


def test_spread_mixes_short_and_long_ones():
    spread = spread_max_tokens(48, 32)
    for first in range(0, 32, 4):
        four = spread[first : first + 4]
        assert max(four) - min(four) > 12


def test_bundled_prompts_are_varied():
    bundled = prompts.load_all()
    texts = prompts.load()
    assert texts == [prompt.text for prompt in bundled]
    assert len(texts) >= 32
    assert len(set(texts)) == len(texts)
    words = sorted(len(text.split()) for text in texts)
    assert min(len(text.split()) for text in texts[:1]) == 5
    assert 350 < words[-1] <= 400
    assert {"en", "de", "fr", "es", "ja", "zh", "ar", "ru", "hi"} <= {p.language for p in bundled}
    assert len({prompt.kind for prompt in bundled}) > 10
