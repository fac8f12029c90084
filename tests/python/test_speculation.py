"""N-gram speculation with real llama.cpp: outputs are what they are without it, in fewer steps.

In single precision without flash attention, as in tests/python/test_kv_memory.py, so that equal
tokens show that what was rejected leaves no trace. Logit biases decide how repetitive outputs are;
how many drafts are verified depends on measured times, so that only a clear case counts them: calls
of these small models take hardly longer with a few more rows.
"""

from __future__ import annotations

import asyncio
import random

import batchcore as bc
import pytest
from batchcore.cli import make_app
from batchcore.errors import ConfigError
from batchcore.testing import synthetic_gguf
from typer.testing import CliRunner

EXACT = {"flash_attn": "off", "type_k": "f32", "type_v": "f32", "check_integrity": True}
NOISE = 1e-3  # nat, as in tests/python/test_batch_equality.py


def make_model(folder, arch, **options):
    return bc.Model(
        synthetic_gguf(folder / "model.gguf", arch, quant="f32", n_layer=3, n_embd=128, **options)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def prompts(count, shortest=5, longest=40, *, seed=1):
    rng = random.Random(seed)
    return [
        [rng.randrange(3, 500) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]


def repeating(variety, max_tokens, **options):
    """Greedy over a few tokens: one is a loop, several come back in an order of the model's."""
    bias = dict.fromkeys(range(100, 100 + variety), 100.0)
    return bc.SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logit_bias": bias}
        | options
    )


def engine(model, most, **options):
    defaults = {"max_num_seqs": 4, "n_ctx": 4 * 512, "n_ubatch": 64}
    return bc.Engine(model, num_speculative_tokens=most, **{**EXACT, **defaults, **options})


def run_both(model, requests, params, **options):
    """Outputs without and with speculation, and the counters of the latter."""
    with engine(model, 0, **options) as plain:
        expected = plain.generate(requests, params)
        assert plain.stats().num_draft_tokens == 0
    with engine(model, 6, **options) as drafting:
        outputs = drafting.generate(requests, params)
        stats = drafting.stats()
    assert stats.num_decode_failures == 0
    return expected, outputs, stats


def assert_same(outputs, expected):
    for ours, theirs in zip(outputs, expected, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.text == other.text
            assert one.finish_reason == other.finish_reason
            assert one.stop_reason == other.stop_reason


@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_a_loop_takes_fewer_steps(model, layout):
    for _ in range(3):  # a busy moment may say that drafts do not pay
        expected, outputs, stats = run_both(
            model, prompts(1), repeating(1, 120), max_num_seqs=1, kv_layout=layout
        )
        assert_same(outputs, expected)
        assert outputs[0].outputs[0].token_ids == [100] * 120
        if stats.num_accepted_tokens > 40:
            break
    assert 40 < stats.num_accepted_tokens <= stats.num_draft_tokens
    assert stats.num_generated_tokens == 120
    assert stats.num_steps <= 121 - stats.num_accepted_tokens


@pytest.mark.parametrize("layout", ["unified", "streams"])
@pytest.mark.parametrize("caching", [True, False])
def test_requests_of_all_kinds_give_the_same(model, layout, caching):
    requests = prompts(24)
    rng = random.Random(5)
    params = []
    for index in range(len(requests)):
        options = {}
        if index % 4 == 1:
            options["stop"] = [model.detokenize([100, 101]), model.detokenize([100] * 12)]
        if index % 5 == 2:
            options["n"] = 2
        if index % 6 == 3:
            options["repetition_penalty"] = 1.1
        if index % 7 == 4:
            options["stop_token_ids"] = [101]
            options["min_tokens"] = 10
        params.append(repeating(rng.randint(1, 4), rng.randint(1, 80), **options))
    expected, outputs, stats = run_both(
        model, requests, params, kv_layout=layout, prefix_caching=caching
    )
    assert_same(outputs, expected)
    assert stats.num_accepted_tokens > 0


def test_draws_are_the_same_at_any_temperature(llama):
    params = [
        repeating(2 + index % 2, 60, temperature=1.0, seed=index, n=1 + index % 2)
        for index in range(6)
    ]
    expected, outputs, _ = run_both(llama, prompts(6), params)
    assert_same(outputs, expected)
    assert len({tuple(out.outputs[0].token_ids) for out in outputs}) > 1


@pytest.mark.parametrize("arch", ["mamba2", "lfm2"])
def test_memories_that_cannot_be_cut_back_draft_nothing(tmp_path, arch):
    expected, outputs, stats = run_both(
        make_model(tmp_path, arch), prompts(3), repeating(1, 40), max_num_seqs=2
    )
    assert_same(outputs, expected)
    assert stats.num_draft_tokens == 0


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_rejected_drafts_leave_no_hole_in_a_window(tmp_path, layout, swa_full):
    model = make_model(tmp_path, "gemma3", sliding_window=32)
    assert model.n_swa == 32
    expected, outputs, stats = run_both(
        model,
        prompts(5, 20, 60),
        [repeating(1 + index % 3, 150) for index in range(5)],
        max_num_seqs=2,
        kv_layout=layout,
        swa_full=swa_full,
    )
    assert_same(outputs, expected)
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0
    assert stats.num_prefill_tokens <= sum(len(out.prompt_token_ids) for out in outputs)


def test_logprobs_of_accepted_tokens(llama):
    expected, outputs, stats = run_both(
        llama, prompts(2), repeating(1, 60, logprobs=5), max_num_seqs=1
    )
    assert stats.num_accepted_tokens > 20
    assert_same(outputs, expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        one, other = ours.outputs[0].logprobs, theirs.outputs[0].logprobs
        assert len(one) == len(other) == 60
        for mine, reference in zip(one, other, strict=True):
            assert mine.token == reference.token
            assert mine.logprob == pytest.approx(reference.logprob, abs=NOISE)
            assert len(mine.top) == 5
            top = [pair[1] for pair in reference.top]
            assert [pair[1] for pair in mine.top] == pytest.approx(top, abs=NOISE)


def test_limits_and_stops_in_the_middle_of_an_accepted_run(llama):
    with engine(llama, 7, max_num_seqs=1) as drafting:
        text = drafting.generate(prompts(1), repeating(1, 60))[0].outputs[0].text
        assert text == llama.detokenize([100] * 60)
        for length in range(20, 32):
            before = drafting.stats().num_accepted_tokens
            for _ in range(3):  # a busy moment may say that drafts do not pay
                out = drafting.generate(prompts(1), repeating(1, length))[0].outputs[0]
                assert out.token_ids == [100] * length
                assert out.finish_reason == "length"
                stop = text[: len(text) * length // 60]
                out = drafting.generate(prompts(1), repeating(1, 200, stop=stop))[0].outputs[0]
                assert (out.text, out.finish_reason, out.stop_reason) == ("", "stop", stop)
                assert out.token_ids == [100] * length
                params = repeating(1, 200, stop_token_ids=[100], min_tokens=length)
                out = drafting.generate(prompts(1), params)[0].outputs[0]
                assert out.finish_reason == "stop"
                assert out.token_ids[-1] == 100
                if drafting.stats().num_accepted_tokens > before:
                    break
            assert drafting.stats().num_accepted_tokens > before


def test_the_longest_sequence_is_filled_to_the_last_cell(llama):
    for layout in ("unified", "streams"):
        with engine(
            llama, 16, max_num_seqs=1, max_sequence_tokens=100, kv_layout=layout
        ) as drafting:
            out = drafting.generate([[5, 6, 7]], repeating(1, 1000))[0].outputs[0]
            assert out.finish_reason == "length"
            assert 97 <= len(out.token_ids) <= 98
            assert drafting.stats().num_accepted_tokens > 20


def test_cancelling_between_accepted_runs(llama):
    with engine(llama, 7, max_num_seqs=2, autostart=False) as drafting:
        handle = drafting.submit([5, 6, 7], repeating(1, 400))
        other = drafting.submit([8, 9], repeating(1, 100))
        while drafting.stats().num_accepted_tokens < 30:
            drafting.step()
        handle.cancel()
        while drafting.has_work:
            drafting.step()
        cancelled = handle.output.outputs[0]
        assert cancelled.finish_reason == "cancelled"
        assert cancelled.token_ids == [100] * len(cancelled.token_ids)
        assert len(cancelled.token_ids) < 400
        assert other.output.outputs[0].token_ids == [100] * 100
        assert drafting.stats().num_running == 0


@pytest.mark.parametrize("preemption", ["recompute", "save"])
def test_too_little_memory(model, preemption):
    requests = prompts(12, 20, 40)
    params = [repeating(1 + index % 2, 60) for index in range(12)]
    expected, _, _ = run_both(model, requests, params)
    with engine(
        model, 6, max_num_seqs=8, n_ctx=256, kv_layout="unified", preemption=preemption
    ) as tight:
        outputs = tight.generate(requests, params)
        stats = tight.stats()
    assert_same(outputs, expected)
    assert stats.num_preemptions > 0
    assert stats.num_decode_failures == 0


def test_an_output_that_was_drafted_is_a_prefix_for_the_next_turn(model):
    with engine(model, 6, max_num_seqs=2, kv_layout="unified") as drafting:
        first = drafting.generate(prompts(1), repeating(2, 100))[0]
        turn = [*first.prompt_token_ids, *first.outputs[0].token_ids, 7, 8, 9]
        second = drafting.generate([turn], repeating(2, 30))[0]
        assert second.num_cached_tokens >= len(turn) - 4
    with engine(model, 0, max_num_seqs=2) as plain:
        assert_same([second], plain.generate([turn], repeating(2, 30)))


def test_streams_deliver_every_token_once(llama):
    async def main():
        async with bc.AsyncEngine(
            llama, num_speculative_tokens=6, max_num_seqs=2, n_ctx=1024, **EXACT
        ) as streaming:

            async def one(prompt):
                deltas = [d async for d in streaming.stream(prompt, repeating(1, 90, logprobs=0))]
                tokens = [token for delta in deltas for token in delta.token_ids]
                logprobs = [one for delta in deltas for one in delta.logprobs or ()]
                assert tokens == [100] * 90
                assert [one.token for one in logprobs] == tokens

            await asyncio.gather(*(one(prompt) for prompt in prompts(4)))
            assert streaming.stats().num_accepted_tokens > 0

    asyncio.run(main())


@pytest.mark.parametrize("value", [-1, 17, 2.5, True, "3"])
def test_numbers_that_can_not_work_are_refused(llama, value):
    with pytest.raises(ConfigError, match="num_speculative_tokens"):
        bc.Engine(llama, num_speculative_tokens=value)


@pytest.mark.parametrize("most", [4, 17])
def test_the_command_line_takes_it(llama, most):
    args = ["generate", "-m", llama.path, "-p", "a a a", "--n-ctx", "256", "--n-threads", "1"]
    result = CliRunner().invoke(make_app(), [*args, f"--num-speculative-tokens={most}"])
    assert (result.exit_code == 0) == (most <= 16)
    assert ("num_speculative_tokens" in result.output) == (most > 16)
