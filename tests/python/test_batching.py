"""Static batches, bucketing and order in `generate`, and what the engine counts of them."""

from __future__ import annotations

import random

import batchcore as bc
import pytest
from batchcore.batching import plan_batches
from batchcore.errors import ConfigError
from batchcore.padding import StaticBatch
from batchcore.testing import synthetic_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("batching") / "model.gguf"
    return bc.Model(synthetic_gguf(path, "llama", quant="f32", n_layer=2, n_embd=64))


def prompts_and_params(count, seed=1):
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 500) for _ in range(rng.randint(2, 90))] for _ in range(count)]
    params = [
        bc.SamplingParams(
            max_tokens=rng.randint(1, 30), temperature=0, ignore_eos=rng.random() < 0.7
        )
        for _ in prompts
    ]
    return prompts, params


@pytest.mark.parametrize("layout", ["unified", "streams"])
@pytest.mark.parametrize("bucketing", [None, "sorted", "equal_count", "powers_of_two", "optimal"])
def test_counted_waste_of_static_batches_is_that_of_the_formula(model, layout, bucketing):
    prompts, params = prompts_and_params(21)
    with bc.Engine(
        model, max_num_seqs=8, n_ctx=8 * 256, n_ubatch=64, kv_layout=layout, check_integrity=True
    ) as engine:
        outputs = engine.generate(prompts, params, batching="static", bucketing=bucketing)
        padding = engine.stats().padding
    batches = plan_batches(
        prompts, params, batching="static", batch_size=8, bucketing=bucketing, order="given"
    )
    assert sorted(index for batch in batches for index in batch) == list(range(21))
    lengths = [len(out.outputs[0].token_ids) for out in outputs]
    formula = [
        StaticBatch(
            num_slots=len(batch),
            prompt_lengths=[len(prompts[i]) for i in batch],
            output_lengths=[lengths[i] for i in batch],
        )
        for batch in batches
    ]
    assert padding.idle_slot_steps == sum(batch.idle_slot_steps for batch in formula) > 0
    assert padding.busy_slot_steps == sum(batch.busy_slot_steps for batch in formula)
    whole = sum(batch.slot_steps for batch in formula)
    assert padding.slot_waste == pytest.approx(padding.idle_slot_steps / whole)


def test_static_and_continuous_give_the_same(model):
    prompts, params = prompts_and_params(12, seed=2)
    options = {"flash_attn": "off", "type_k": "f32", "type_v": "f32"}
    with bc.Engine(model, max_num_seqs=4, n_ctx=2048, **options) as engine:
        want = [out.outputs[0].token_ids for out in engine.generate(prompts, params)]
        assert engine.stats().padding.slot_waste == 0
        for order in ("longest_first", "prefix_groups"):
            got = engine.generate(prompts, params, order=order)
            assert [out.outputs[0].token_ids for out in got] == want
        for size in (1, 3, None):
            got = engine.generate(prompts, params, batching="static", batch_size=size)
            assert [out.outputs[0].token_ids for out in got] == want


def test_a_static_batch_that_does_not_fit_does_not_wait_for_itself(model):
    prompts, params = prompts_and_params(10, seed=3)
    with bc.Engine(model, max_num_seqs=3, n_ctx=300, check_integrity=True) as engine:
        outputs = engine.generate(prompts, params, batching="static", batch_size=10)
        assert all(out.finished for out in outputs)
        several = bc.SamplingParams(max_tokens=6, n=3, ignore_eos=True)
        outputs = engine.generate(prompts[:4], several, batching="static", batch_size=2)
        assert all(len(one.token_ids) == 6 for out in outputs for one in out.outputs)


def test_lock_step_starts_when_every_prompt_is_computed(model):
    with bc.Engine(
        model, max_num_seqs=4, n_ctx=1024, n_ubatch=32, autostart=False, prefix_caching=False
    ) as engine:
        params = bc.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        short, long = engine._submit(
            [bc.Submission([5, 6], params), bc.Submission(list(range(3, 103)), params)],
            streams=True,
            in_lock_step=True,
        )
        seen = []
        while engine.has_work:
            engine.step()
            seen.append(
                (len(short.output.outputs[0].token_ids), len(long.output.outputs[0].token_ids))
            )
    assert max(a for a, b in seen if b == 0) == 1
    assert seen[-5:] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


@pytest.mark.parametrize("kernels", ["auto", "ggml"])
def test_attention_is_counted(tmp_path, kernels):
    path = synthetic_gguf(tmp_path / "model.gguf", "llama", quant="f32", n_layer=2, n_embd=64)
    model = bc.Model(path, kernels=kernels)
    prompt = list(range(3, 43))
    with bc.Engine(model, max_num_seqs=4, n_ctx=1024, n_ubatch=64, prefix_caching=False) as engine:
        out = engine.generate(
            prompt, bc.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        )[0]
        padding = engine.stats().padding
    # 40 prompt rows and two of three generated tokens, in two layers: in blocks of 256 cells, or of
    # 32 positions, which are two blocks for ten of the rows.
    computed = 42 * 256 if model.kernels == "ggml" else 32 * 32 + 10 * 64
    assert out.padding.attention_needed == 2 * sum(range(1, 43))
    assert out.padding.attention_computed == 2 * computed
    assert (padding.attention_needed, padding.attention_computed) == (
        out.padding.attention_needed,
        out.padding.attention_computed,
    )
    assert padding.attention_waste == pytest.approx(1 - 903 / computed)
    assert padding.shape_waste == 0


def test_kernels_that_take_any_number_of_rows_get_no_others(model):
    if model.kernels == "ggml":
        pytest.skip("ggml's kernels take rows in groups")
    prompts, params = prompts_and_params(40)
    with bc.Engine(
        model, max_num_seqs=7, n_ctx=4096, n_ubatch=256, kv_layout="unified", autostart=False
    ) as engine:
        engine.generate(prompts, params)
        stats = engine.stats()
    assert stats.padding.num_filler_rows == stats.padding.num_extra_outputs == 0
    assert stats.padding.num_rows == stats.num_prefill_tokens + stats.num_decode_rows
    # Decoding and prompts share a call, of more than 64 rows too.
    assert stats.step_tokens.quantile(1.0) > 64
    assert stats.num_micro_batches == stats.num_steps


def test_attention_of_other_sequences_is_counted_where_it_is_computed(model):
    params = bc.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[3 + 90 * i + j for j in range(60 + i)] for i in range(6)]
    computed = []
    for max_num_seqs in (1, 6):
        with bc.Engine(
            model,
            max_num_seqs=max_num_seqs,
            n_ctx=1024,
            n_ubatch=64,
            kv_layout="unified",
            prefix_caching=False,
        ) as engine:
            outputs = engine.generate(prompts, params)
        computed.append([out.padding.attention_computed for out in outputs])
    alone, together = computed
    if model.kernels == "ggml":
        assert sum(together) > sum(alone)
    else:
        assert together == alone


@pytest.mark.parametrize("arch", ["gemma3", "mamba2", "lfm2", "falcon-h1"])
def test_attention_is_counted_for_every_kind_of_memory(tmp_path, arch):
    model = bc.Model(synthetic_gguf(tmp_path / "model.gguf", arch, n_layer=4, n_embd=128))
    with bc.Engine(model, max_num_seqs=4, n_ctx=1024) as engine:
        engine.generate([[5, 6, 7]] * 3, bc.SamplingParams(max_tokens=4))
        padding = engine.stats().padding
    if arch == "mamba2":
        assert padding.attention_computed == padding.attention_needed == 0
    else:
        assert 0 < padding.attention_needed < padding.attention_computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "dynamic"}, "'continuous' or 'static'"),
        ({"bucketing": "sorted"}, "for batching='static'"),
        ({"batching": "static", "order": "longest_first"}, "for batching='continuous'"),
        ({"batching": "static", "batch_size": -1}, "at least 1"),
        ({"batching": "static", "bucketing": "magic"}, "'magic'"),
        ({"batching": "static", "bucketing": lambda lengths: [[0]]}, "exactly one bucket"),
        ({"order": "random"}, "'random'"),
    ],
)
def test_misuse_is_named(model, options, message):
    with (
        bc.Engine(model, max_num_seqs=2, n_ctx=256) as engine,
        pytest.raises(ConfigError, match=message),
    ):
        engine.generate([[5], [6]], **options)


def test_nothing_to_do(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=256) as engine:
        assert engine.generate([]) == []
        assert engine.generate([], batching="static", bucketing="optimal") == []


def test_a_bucketing_function_of_ones_own(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=256) as engine:
        outputs = engine.generate(
            [[5, 6], [7]],
            bc.SamplingParams(max_tokens=2),
            batching="static",
            bucketing=lambda lengths: [[1], [0]],
        )
        assert [len(out.prompt_token_ids) for out in outputs] == [2, 1]
