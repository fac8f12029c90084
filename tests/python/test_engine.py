"""Engine: what callers rely on, with a real model."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import batchcore as bc
import pytest
from batchcore import engine_options
from batchcore.errors import (
    ConfigError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
)
from batchcore.testing import synthetic_gguf

GREEDY = bc.SamplingParams(temperature=0, max_tokens=12)
LONG = bc.SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
BUSY = bc.SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def model(smollm2_path):
    return bc.Model(smollm2_path)


@pytest.fixture(scope="module")
def engine(model):
    with bc.Engine(model, max_num_seqs=8, n_ctx=4096, check_integrity=True) as engine:
        yield engine


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def is_idle(engine):
    stats = engine.stats()
    return stats.num_running == 0 and stats.num_waiting == 0 and stats.num_active_cells == 0


def test_outputs_come_in_the_order_of_the_prompts(engine):
    prompts = ["The capital of France is", "One, two, three,", "The sky is"]
    together = engine.generate(prompts, GREEDY)
    assert [engine.model.detokenize(out.prompt_token_ids) for out in together] == prompts
    for prompt, out in zip(prompts, together, strict=True):
        assert out.finished
        assert len(out.outputs) == 1
        assert out.outputs[0].text == engine.generate(prompt, GREEDY)[0].text
        assert out.outputs[0].finish_reason in ("length", "stop")


def test_tokens_and_text_are_the_same_prompt(engine):
    prompt = "The capital of France is"
    tokens = engine.tokenize(prompt)
    assert engine.generate(tokens, GREEDY)[0].text == engine.generate(prompt, GREEDY)[0].text
    assert len(engine.generate([tokens, tokens[:2]], GREEDY)) == 2


def test_each_prompt_may_have_its_own_parameters(engine):
    short, long = engine.generate(
        ["a", "b"],
        [
            bc.SamplingParams(max_tokens=2, ignore_eos=True),
            bc.SamplingParams(max_tokens=5, ignore_eos=True),
        ],
    )
    assert len(short.outputs[0].token_ids) == 2
    assert len(long.outputs[0].token_ids) == 5
    with pytest.raises(InvalidRequestError, match="2 sets of parameters for 1"):
        engine.generate("a", [GREEDY, GREEDY])


def test_no_prompts_no_outputs(engine):
    assert engine.generate([]) == []


def test_stream_gives_what_generate_gives(engine):
    params = bc.SamplingParams(max_tokens=20, seed=5, temperature=0.9, logprobs=2)
    whole = engine.generate("Once upon a time", params)[0].outputs[0]
    deltas = list(engine.stream("Once upon a time", params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [lp for delta in deltas for lp in delta.logprobs] == whole.logprobs
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.finish_reason
    assert len(deltas) > 3


def test_a_seed_fixes_the_output_whatever_runs_beside_it(tmp_path):
    # In single precision, since quantised kernels of other batch sizes give other probabilities.
    model = bc.Model(synthetic_gguf(tmp_path / "model.gguf", "llama", quant="f32"))
    exact = {"flash_attn": "off", "type_k": "f32", "type_v": "f32"}
    params = bc.SamplingParams(max_tokens=24, seed=42, top_k=40, top_p=0.95, ignore_eos=True)
    outputs = []
    for n_threads in (1, 2):
        with bc.Engine(model, max_num_seqs=8, n_ctx=2048, n_threads=n_threads, **exact) as engine:
            outputs.append(engine.generate([[7, 8, 9]], params)[0].outputs[0].token_ids)
            beside = [engine.submit([20 + i, 3], BUSY) for i in range(6)]
            outputs.append(engine.generate([[7, 8, 9]], params)[0].outputs[0].token_ids)
            for handle in beside:
                handle.cancel()
            unseeded = [engine.generate([[7, 8, 9]])[0].outputs[0].token_ids for _ in range(4)]
            assert len({tuple(tokens) for tokens in unseeded}) > 1
    assert all(tokens == outputs[0] for tokens in outputs)


def test_several_completions_share_one_prefill(engine):
    before = engine.stats()
    out = engine.generate(
        "A list of colours that nobody has asked for before:",
        bc.SamplingParams(n=4, max_tokens=10, seed=3),
    )[0]
    after = engine.stats()
    assert [completion.index for completion in out.outputs] == [0, 1, 2, 3]
    assert len({completion.text for completion in out.outputs}) > 1
    computed = after.num_prefill_tokens - before.num_prefill_tokens
    assert computed <= len(out.prompt_token_ids)


def test_stop_strings_and_tokens(engine):
    text = engine.generate("One, two, three,", GREEDY)[0].outputs[0].text
    stop = text[5:8]
    out = engine.generate(
        "One, two, three,", bc.SamplingParams(temperature=0, max_tokens=12, stop=stop)
    )[0].outputs[0]
    assert out.finish_reason == "stop"
    assert out.stop_reason == stop
    assert out.text == text[: text.index(stop)]
    token = engine.generate("One, two, three,", GREEDY)[0].outputs[0].token_ids[3]
    out = engine.generate(
        "One, two, three,", bc.SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[token])
    )[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert out.token_ids[-1] == token


def test_the_models_own_end(engine):
    end = engine.model.end_of_generation[0]
    params = bc.SamplingParams(temperature=0, max_tokens=9, min_tokens=3, logit_bias={end: 1e4})
    out = engine.generate("Hello", params)[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    assert len(out.token_ids) == 4
    assert engine.model.detokenize(out.token_ids[:3]) == out.text


def test_logprobs(engine):
    out = engine.generate(
        "The capital of France is", bc.SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    )[0].outputs[0]
    assert len(out.logprobs) == 4
    for token, position in zip(out.token_ids, out.logprobs, strict=True):
        assert position.token == token
        assert len(position.top) == 3
        assert position.top[0] == (token, position.logprob)
        values = [value for _, value in position.top]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in values)
    assert out.cumulative_logprob == pytest.approx(sum(p.logprob for p in out.logprobs))
    assert engine.generate("x", GREEDY)[0].outputs[0].logprobs is None


def test_metrics(engine):
    metrics = engine.generate("Hello there", GREEDY)[0].metrics
    assert 0 <= metrics.queue_s <= metrics.ttft_s <= metrics.latency_s
    assert metrics.tpot_s > 0
    assert metrics.num_preemptions == 0


def test_cached_prefix_is_counted(engine):
    prompt = "Some text that comes first, and is long enough to be of use to those that follow. "
    engine.generate(prompt + "One", GREEDY)
    out = engine.generate(prompt + "Two", GREEDY)[0]
    assert out.num_cached_tokens >= len(engine.tokenize(prompt)) - 2


@pytest.mark.parametrize("how", ["cancel", "drop", "leave the loop", "close the iterator"])
def test_whoever_stops_listening_frees_the_slot(engine, how):
    if how == "cancel":
        handle = engine.submit("Count:", LONG)
        next(iter(handle))
        handle.cancel()
        assert handle.result().outputs[0].finish_reason == "cancelled"
    elif how == "drop":
        handle = engine.submit("Count:", LONG)
        del handle
        gc.collect()
    elif how == "leave the loop":
        for _ in engine.stream("Count:", LONG):
            break
        gc.collect()
    else:
        deltas = engine.stream("Count:", LONG)
        next(deltas)
        deltas.close()
    wait_until(lambda: is_idle(engine))


def test_timeout(engine):
    with pytest.raises(RequestTimeoutError) as caught:
        engine.generate("Count:", LONG, timeout=0.2)
    assert caught.value.output.outputs[0].finish_reason == "timeout"
    deltas = list(engine.stream("Count:", LONG, timeout=0.2))
    assert deltas[-1].finish_reason == "timeout"
    wait_until(lambda: is_idle(engine))
    for bad in (0, -1, float("nan")):
        with pytest.raises(InvalidRequestError, match="timeout"):
            engine.generate("x", timeout=bad)


@pytest.mark.parametrize(
    "prompt", ["", [], [10**6], [-1], [2**40], [1.5], b"hello", None, object(), ["a", 3.5j]]
)
def test_bad_prompts_are_refused(engine, prompt):
    with pytest.raises((InvalidRequestError, TypeError)):
        engine.generate([prompt], GREEDY)
    assert engine.generate("Hello", GREEDY)


def test_too_long_a_prompt_says_how_long(engine):
    with pytest.raises(PromptTooLongError) as caught:
        engine.generate([[5] * 5000], GREEDY)
    assert (caught.value.num_tokens, caught.value.limit) == (5000, 4096)


def test_full_queue_refuses_at_once(model):
    with bc.Engine(model, max_num_seqs=1, n_ctx=512, max_queued_requests=2) as engine:
        running = engine.submit("a", LONG)
        next(iter(running))
        waiting = [engine.submit("a", GREEDY), engine.submit("a", GREEDY)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit("a", GREEDY)
        assert caught.value.capacity == 2
        running.cancel()
        assert all(handle.result().finished for handle in waiting)


def test_outgrowing_the_context_ends_with_length(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=256, check_integrity=True) as engine:
        out = engine.generate("Count:", LONG)[0]
        assert out.outputs[0].finish_reason == "length"
        assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == 257


def test_sequences_stay_within_what_the_model_was_trained_with(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=2 * model.n_ctx_train) as engine:
        assert engine.n_ctx == 2 * model.n_ctx_train
        assert engine.max_sequence_tokens == model.n_ctx_train
    with pytest.warns(UserWarning, match="trained"):
        bc.Engine(
            model,
            max_num_seqs=2,
            n_ctx=2 * model.n_ctx_train,
            max_sequence_tokens=model.n_ctx_train + 1,
        ).close()
    with bc.Engine(model, max_num_seqs=2, n_ctx=512, max_sequence_tokens=100) as engine:
        assert len(engine.generate("x", LONG)[0].outputs[0].token_ids) == 100


def test_closing_ends_every_request_with_a_typed_error(model):
    engine = bc.Engine(model, max_num_seqs=2, n_ctx=512)
    handles = [engine.submit("Count:", LONG) for _ in range(5)]
    next(iter(handles[0]))
    engine.close()
    engine.close()
    for handle in handles[1:]:
        with pytest.raises(EngineClosedError):
            handle.result()
    with pytest.raises(EngineClosedError):
        engine.generate("x")


def test_closing_while_others_wait(model):
    engine = bc.Engine(model, max_num_seqs=2, n_ctx=512)
    errors = []

    def wait():
        try:
            engine.generate("Count:", LONG)
        except EngineClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.stats().num_running == 2)
    engine.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(errors) == 6


def test_manual_stepping_is_deterministic(model):
    runs = []
    for _ in range(2):
        with bc.Engine(model, max_num_seqs=2, n_ctx=512, autostart=False) as engine:
            handles = [engine.submit(p, GREEDY) for p in ("One", "Two", "Three")]
            steps = []
            while engine.has_work:
                outputs = engine.step()
                steps.append([(out.request_id, list(out.outputs[0].token_ids)) for out in outputs])
            texts = [handle.result().text for handle in handles]
            assert texts == [handle.output.text for handle in handles]
            runs.append((steps, texts))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) > 10


def test_an_engine_that_steps_itself_refuses_step(engine):
    with pytest.raises(EngineError, match="autostart"):
        engine.step()


def test_generate_steps_where_nobody_else_does(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=512, autostart=False) as engine:
        assert engine.generate("Hello", GREEDY)[0].finished
        assert "".join(delta.text for delta in engine.stream("Hello", GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 10_000},
        {"n_ctx": -1},
        {"n_ubatch": 0},
        {"n_threads": 0},
        {"kv_layout": "paged"},
        {"prefill_policy": "fast"},
        {"flash_attn": "maybe"},
        {"type_k": "q7_9"},
        {"target_itl_ms": float("nan")},
        {"max_queued_requests": 0},
    ],
)
def test_bad_options_are_named(model, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        bc.Engine(model, **options)


def auto_layout(**options):
    defaults = {
        "on_cpu": True,
        "skips_others": False,
        "memory_kind": "attention",
        "prefix_caching": True,
        "cells_per_sequence": 512,
        "max_sequence_tokens": None,
    }
    return engine_options.layout_for(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, "unified"),
        ({"prefix_caching": False}, "streams"),
        ({"max_sequence_tokens": 512}, "streams"),
        ({"max_sequence_tokens": 513}, "unified"),
        ({"max_sequence_tokens": 512, "on_cpu": False}, "unified"),
        ({"max_sequence_tokens": 512, "memory_kind": "hybrid"}, "unified"),
        ({"skips_others": True, "prefix_caching": False}, "unified"),
        ({"skips_others": True, "max_sequence_tokens": 512}, "unified"),
    ],
)
def test_the_layout_follows_from_what_attention_computes(options, layout):
    assert auto_layout(**options) == layout


@pytest.mark.parametrize("flash_attn", ["auto", "off"])
@pytest.mark.parametrize("kernels", ["auto", "ggml"])
def test_the_layout_is_unified_where_attention_skips_other_sequences(tmp_path, kernels, flash_attn):
    path = synthetic_gguf(tmp_path / "model.gguf", "llama", n_layer=2, n_embd=64)
    model = bc.Model(path, kernels=kernels, n_gpu_layers=0)
    with bc.Engine(
        model, max_num_seqs=2, n_ctx=512, max_sequence_tokens=256, flash_attn=flash_attn
    ) as engine:
        skips_others = model.kernels != "ggml" and flash_attn == "auto"
        assert engine.kv_layout == ("unified" if skips_others else "streams")


def test_a_missing_model_is_a_load_error(tmp_path):
    with pytest.raises(ModelLoadError):
        bc.Engine(tmp_path / "none.gguf")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_gets_a_clear_error(engine):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.submit("x")
            os.write(write, b"no error")
        except EngineError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "after fork" in pipe.read()


EXIT_SCRIPT = """
import sys, batchcore as bc
engine = bc.Engine(sys.argv[1], max_num_seqs=2, n_ctx=512)
handles = [engine.submit("Count:", bc.SamplingParams(max_tokens=400, ignore_eos=True))
           for _ in range(4)]
next(iter(handles[0]))
print("leaving", flush=True)
"""


def test_leaving_the_interpreter_with_work_in_flight(smollm2_path):
    done = subprocess.run(
        [sys.executable, "-c", EXIT_SCRIPT, str(smollm2_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "leaving", "")


FORK_SCRIPT = """
import os, sys, batchcore as bc
engine = bc.Engine(sys.argv[1], max_num_seqs=2, n_ctx=512)
engine.generate("x")
child = os.fork()
if child == 0:
    sys.exit(0)  # runs the exit handlers and destroys the copied engine
_, status = os.waitpid(child, 0)
print("child", status, engine.generate("x")[0].finished)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_exits_and_the_parent_goes_on(smollm2_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK_SCRIPT, str(smollm2_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "child 0 True", done.stderr
