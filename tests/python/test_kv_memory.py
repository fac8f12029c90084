"""KV memory with real llama.cpp: pressure, pins, the host tier, windows, recurrent states, cancels.

In single precision without flash attention, outputs are the same in whatever batch they run
(tests/python/test_batch_equality.py), so that here equal tokens show that no cell was mixed up.
"""

from __future__ import annotations

import random
import time

import batchcore as bc
import pytest
from batchcore.errors import ConfigError, InvalidRequestError
from batchcore.testing import synthetic_gguf

EXACT = {"flash_attn": "off", "type_k": "f32", "type_v": "f32", "check_integrity": True}


@pytest.fixture(scope="module", params=["llama", "gemma3", "mamba2", "lfm2"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def model(arch, tmp_path_factory):
    path = tmp_path_factory.mktemp(arch) / "model.gguf"
    return bc.Model(synthetic_gguf(path, arch, quant="f32", n_layer=3, n_embd=128))


def random_prompts(count, shortest, longest, *, seed=1, shared=()):
    rng = random.Random(seed)
    return [
        [*shared, *(rng.randrange(3, 500) for _ in range(rng.randint(shortest, longest)))]
        for _ in range(count)
    ]


def tokens_of(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def greedy(max_tokens):
    return bc.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def run_alone(model, prompts, params):
    with bc.Engine(model, max_num_seqs=1, n_ctx=1024, prefix_caching=False, **EXACT) as engine:
        return tokens_of([engine.generate([prompt], params)[0] for prompt in prompts])


def test_sequences_that_move_next_to_others_go_on_as_if_nothing_had_happened(model):
    lengths = [60, 8, 60, 10, 14, 60]
    with bc.Engine(model, max_num_seqs=6, n_ctx=6 * 256, kv_layout="streams", **EXACT) as engine:
        # Whether a move pays is decided by measured times: until it has.
        for seed in range(20):
            prompts = random_prompts(len(lengths), 5, 20, seed=seed)
            outputs = engine.generate(prompts, [greedy(length) for length in lengths])
            if engine.stats().num_slot_moves > 0:
                break
        assert engine.stats().num_slot_moves > 0
    alone = run_alone(model, prompts, greedy(max(lengths)))
    for output, length, whole in zip(tokens_of(outputs), lengths, alone, strict=True):
        assert output == whole[:length]


@pytest.mark.parametrize("preemption", ["auto", "recompute", "save"])
def test_four_times_too_little_memory_fails_nobody(model, preemption):
    prompts = random_prompts(16, 30, 60)
    params = greedy(60)
    wanted = sum(len(prompt) + 60 for prompt in prompts)
    with bc.Engine(
        model,
        max_num_seqs=12,
        n_ctx=max(wanted // 4, 256),
        n_ubatch=64,
        kv_layout="unified",
        preemption=preemption,
        **EXACT,
    ) as engine:
        outputs = engine.generate(prompts, params)
        stats = engine.stats()
    assert {out.outputs[0].finish_reason for out in outputs} == {"length"}
    assert tokens_of(outputs) == run_alone(model, prompts, params)
    assert stats.num_preemptions > 0
    if preemption != "auto":
        assert (stats.num_saves > 0) == (preemption == "save")
    assert stats.saved_bytes == 0
    assert max(out.metrics.num_preemptions for out in outputs) > 0


@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_a_warm_prefix_is_computed_once_and_changes_nothing(model, layout):
    system = random_prompts(1, 100, 100)[0]
    prompts = random_prompts(10, 1, 20, seed=2, shared=system)
    with bc.Engine(
        model, max_num_seqs=6, n_ctx=6 * 256, n_ubatch=64, kv_layout=layout, **EXACT
    ) as engine:
        with engine.warm(system) as prefix:
            assert prefix.num_tokens == 100
            assert engine.stats().num_pinned == 1
            outputs = engine.generate(prompts, greedy(8))
            assert [out.num_cached_tokens for out in outputs] == [100] * 10
        engine.generate(random_prompts(12, 100, 200, seed=3), greedy(2))
        prefix.release()  # again: nothing happens
        assert engine.stats().num_pinned == 0
    assert tokens_of(outputs) == run_alone(model, prompts, greedy(8))


def test_pins_are_bounded_and_need_a_cache(smollm2):
    with bc.Engine(smollm2, max_num_seqs=2, n_ctx=256) as engine:
        kept = [engine.warm([number]) for number in (5, 6)]
        with pytest.raises(InvalidRequestError, match="keep 2 prefixes"):
            engine.warm([7])
        kept[0].release()
        engine.generate([5, 6, 7], greedy(1))  # a step takes it in
        engine.warm([7])
    with (
        bc.Engine(smollm2, max_num_seqs=2, n_ctx=256, prefix_caching=False) as engine,
        pytest.raises(InvalidRequestError, match="cached at all"),
    ):
        engine.warm([5])


def test_warm_on_an_event_loop_and_by_hand(smollm2):
    import asyncio

    async def main():
        async with bc.AsyncEngine(smollm2, max_num_seqs=2, n_ctx=256) as engine:
            prefix = await engine.warm("Be kind.")
            out = await engine.generate("Be kind. Now", greedy(2))
            assert out.num_cached_tokens >= prefix.num_tokens - 1
            prefix.release()

    asyncio.run(main())
    with bc.Engine(smollm2, max_num_seqs=2, n_ctx=256, autostart=False) as engine:
        assert engine.warm("Be kind.").num_tokens > 1
        assert engine.stats().num_pinned == 1


@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_evicted_prefixes_come_back_from_host_memory(model, layout):
    system = random_prompts(1, 150, 150)[0]
    asked = random_prompts(1, 3, 3, seed=9, shared=system)
    with bc.Engine(
        model,
        max_num_seqs=4,
        n_ctx=1024,
        n_ubatch=64,
        kv_layout=layout,
        host_cache_bytes=1 << 26,
        preemption="save",  # these models are too small for a copy to pay
        **EXACT,
    ) as engine:
        engine.warm(system).release()
        engine.generate(random_prompts(16, 120, 200, seed=4), greedy(4))
        before = engine.stats()
        assert before.host_cache_bytes > 0
        outputs = engine.generate(asked, greedy(12))
        assert engine.stats().num_host_tokens - before.num_host_tokens == 150
    assert outputs[0].num_cached_tokens == 150
    assert tokens_of(outputs) == run_alone(model, asked, greedy(12))


def test_the_host_tier_is_off_unless_asked_for(smollm2):
    with bc.Engine(smollm2, max_num_seqs=2, n_ctx=256) as engine:
        engine.generate(random_prompts(8, 100, 120), greedy(2))
        assert engine.stats().num_evictions > 0
        assert engine.stats().host_cache_bytes == 0
    with pytest.raises(ConfigError, match="host_cache_bytes"):
        bc.Engine(smollm2, host_cache_bytes=-1)


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_windows_that_have_moved_on_corrupt_nobody(tmp_path, layout, swa_full):
    model = bc.Model(
        synthetic_gguf(
            tmp_path / "model.gguf",
            "gemma3",
            quant="f32",
            n_layer=3,
            n_embd=128,
            metadata={"gemma3.attention.sliding_window": 32},
        )
    )
    assert model.n_swa == 32
    system = random_prompts(1, 90, 90)[0]
    prompts = [
        *random_prompts(12, 1, 60, seed=2, shared=system),
        *random_prompts(6, 1, 30, seed=3, shared=system[:50]),
        *random_prompts(6, 20, 120, seed=5),
    ]
    random.Random(7).shuffle(prompts)
    with bc.Engine(
        model,
        max_num_seqs=4,
        n_ctx=1200,
        n_ubatch=32,
        kv_layout=layout,
        swa_full=swa_full,
        **EXACT,
    ) as engine:
        outputs = engine.generate(prompts, greedy(30))
        again = engine.generate(prompts, greedy(30))
        stats = engine.stats()
    alone = run_alone(model, prompts, greedy(30))
    assert tokens_of(outputs) == alone
    assert tokens_of(again) == alone
    assert stats.num_decode_failures == 0
    if swa_full:
        assert stats.num_cached_tokens > 0


def test_the_real_window_model_shares_prefixes_with_and_without_full_windows(gemma3):
    text = "The museum opens at nine and closes at five. " * 80
    system = gemma3.tokenize_prompt(text)[:700]  # longer than the window of 512
    prompts = random_prompts(4, 3, 8, shared=system)
    cached = {}
    for swa_full in (True, False):
        with bc.Engine(
            gemma3, max_num_seqs=4, n_ctx=4096, swa_full=swa_full, check_integrity=True
        ) as engine:
            first = engine.generate(prompts, greedy(4))
            cached[swa_full] = engine.stats().num_cached_tokens
            assert engine.stats().num_decode_failures == 0
            assert {out.outputs[0].finish_reason for out in first} == {"length"}
    assert cached[True] >= 3 * 690


def test_a_running_decode_is_cut_short_when_its_only_request_is_cancelled(smollm2):
    prompt = random_prompts(1, 1800, 1800)[0]
    with bc.Engine(smollm2, max_num_seqs=2, n_ctx=2048, n_ubatch=1024) as engine:
        for _ in range(20):
            handle = engine.submit(prompt, greedy(4))
            time.sleep(0.05)  # most likely inside its call, which takes much longer
            handle.cancel()
            assert handle.result().outputs[0].finish_reason in ("cancelled", "length")
            if engine.stats().num_interrupts > 0:
                break
        assert engine.stats().num_interrupts > 0
        assert engine.stats().num_decode_failures == 0
        out = engine.generate(prompt[:50], greedy(4))[0]
        assert out.outputs[0].finish_reason == "length"


def test_gaps_between_streams_are_bridged_without_a_trace(model):
    prompts = random_prompts(30, 3, 30)
    rng = random.Random(3)
    lengths = [40, 8] * 4 + [rng.randint(1, 40) for _ in prompts[8:]]
    params = [greedy(length) for length in lengths]
    with bc.Engine(
        model,
        max_num_seqs=7,
        n_ctx=7 * 256,
        n_ubatch=64,
        kv_layout="streams",
        prefix_caching=False,
        autostart=False,
        **EXACT,
    ) as engine:
        handles = [engine.submit(*request) for request in zip(prompts, params, strict=True)]
        while engine.stats().num_running < 7:
            engine.step()
        # Somebody waits, so that nobody moves; but gets no slot, so that the gaps stay.
        engine.pause()
        while engine.stats().num_running > 0:
            engine.step()
        stats = engine.stats()
        engine.resume()
        while not all(handle.finished for handle in handles):
            engine.step()
        outputs = [handle.result() for handle in handles]
    assert stats.num_slot_moves == 0
    assert stats.padding.num_filler_rows > 0
    alone = [
        tokens[: one.max_tokens]
        for tokens, one in zip(run_alone(model, prompts, greedy(40)), params, strict=True)
    ]
    assert tokens_of(outputs) == alone


def test_stats_describe_the_last_step_and_the_cost_of_steps(smollm2):
    with bc.Engine(smollm2, max_num_seqs=4, n_ctx=1024) as engine:
        engine.generate(random_prompts(8, 20, 60), greedy(12))
        stats = engine.stats()
    assert stats.step_decode_rows >= 1
    assert stats.step_s > 0
    assert len(stats.cost_s) == 4
    assert all(seconds >= 0 for seconds in stats.cost_s)
    assert sum(stats.cost_s) > 0
