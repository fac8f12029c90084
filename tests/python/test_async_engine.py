"""AsyncEngine: the same engine through an event loop."""

from __future__ import annotations

import asyncio
import gc
import random
import time

import batchcore as bc
import pytest
from batchcore.errors import ConfigError, EngineClosedError, EngineError, RequestTimeoutError
from batchcore.testing import synthetic_gguf

GREEDY = bc.SamplingParams(temperature=0, max_tokens=8)
LONG = bc.SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)


def _uvloop_runner():
    uvloop = pytest.importorskip("uvloop")
    return uvloop.run


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    return asyncio.run if request.param == "asyncio" else _uvloop_runner()


@pytest.fixture(scope="module")
def model(smollm2_path):
    return bc.Model(smollm2_path)


@pytest.fixture(scope="module")
def precise_model(tmp_path_factory):
    """Single precision: texts of a quantised model may part at a tie from one call to the next."""
    path = tmp_path_factory.mktemp("precise") / "model.gguf"
    return bc.Model(synthetic_gguf(path, "llama", quant="f32", n_layer=3, n_embd=128))


async def until_idle(engine):
    for _ in range(3000):
        stats = engine.stats()
        if stats.num_running == stats.num_waiting == stats.num_active_cells == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine never came to rest")


def test_generate_and_stream(run, precise_model):
    async def main():
        async with bc.AsyncEngine(
            precise_model,
            max_num_seqs=8,
            n_ctx=2048,
            flash_attn="off",
            type_k="f32",
            type_v="f32",
        ) as engine:
            outs = await asyncio.gather(
                *(engine.generate(f"Number {i} is", GREEDY) for i in range(12))
            )
            text = "".join([d.text async for d in engine.stream("Number 3 is", GREEDY)])
            handle = await engine.submit("Number 3 is", GREEDY)
            assert (await handle).text == text
            return outs, text

    outs, text = run(main())
    assert all(out.finished for out in outs)
    assert outs[3].text == text


@pytest.mark.parametrize("how", ["task", "iterator", "handle", "drop", "timeout"])
def test_whoever_stops_listening_frees_the_slot(run, model, how):
    async def main():
        async with bc.AsyncEngine(model, max_num_seqs=4, n_ctx=2048) as engine:
            if how == "task":
                task = asyncio.create_task(engine.generate("Count:", LONG))
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "iterator":
                stream = engine.stream("Count:", LONG)
                await anext(stream)
                await stream.aclose()
            elif how == "handle":
                handle = await engine.submit("Count:", LONG)
                handle.cancel()
                assert (await handle).outputs[0].finish_reason == "cancelled"
            elif how == "drop":
                handle = await engine.submit("Count:", LONG)
                del handle
                gc.collect()
            else:
                with pytest.raises(RequestTimeoutError):
                    await engine.generate("Count:", LONG, timeout=0.1)
            await until_idle(engine)

    run(main())


def test_closing_ends_what_is_in_flight(run, model):
    async def main():
        engine = bc.AsyncEngine(model, max_num_seqs=2, n_ctx=1024)
        await engine.start()
        tasks = [asyncio.create_task(engine.generate("Count:", LONG)) for _ in range(5)]
        await asyncio.sleep(0.1)
        await engine.aclose()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineClosedError) for result in results)
        with pytest.raises(EngineClosedError):
            await engine.generate("x")

    run(main())


def test_an_engine_handed_in_stays_open(model):
    async def main(engine):
        async with bc.AsyncEngine(engine) as served:
            task = asyncio.create_task(served.generate("Count:", LONG))
            await asyncio.sleep(0.1)
        return (await task).outputs[0].finish_reason

    with bc.Engine(model, max_num_seqs=2, n_ctx=1024) as engine:
        assert asyncio.run(main(engine)) == "cancelled"
        assert engine.generate("Hello", GREEDY)[0].finished


def test_another_event_loop_is_refused(model):
    engine = bc.AsyncEngine(model, max_num_seqs=2, n_ctx=1024)
    asyncio.run(engine.start())
    with pytest.raises(EngineError, match="another event loop"):
        asyncio.run(engine.generate("x"))
    engine.engine.close()


def test_an_engine_without_a_loop_is_refused(model):
    with (
        bc.Engine(model, max_num_seqs=2, n_ctx=512, autostart=False) as engine,
        pytest.raises(ConfigError, match="autostart"),
    ):
        asyncio.run(bc.AsyncEngine(engine).generate("x"))


def test_not_loaded_yet_is_said():
    with pytest.raises(EngineError, match="start"):
        _ = bc.AsyncEngine("model.gguf").engine


def test_a_blocked_event_loop_loses_nothing(model):
    async def main():
        async with bc.AsyncEngine(model, max_num_seqs=2, n_ctx=1024) as engine:
            stream = engine.stream("Count:", bc.SamplingParams(max_tokens=40, ignore_eos=True))
            count = len((await anext(stream)).token_ids)
            time.sleep(1.0)  # noqa: ASYNC251 (that is the point)
            async for delta in stream:
                count += len(delta.token_ids)
            return count

    assert asyncio.run(main()) == 40


def test_200_tasks_with_random_cancels(model):
    async def main():
        rng = random.Random(7)
        ended = {}

        async def one(engine, index):
            params = bc.SamplingParams(max_tokens=rng.randint(1, 24), seed=index)
            prompt = "word " * rng.randint(1, 40)
            if rng.random() < 0.4:
                task = asyncio.create_task(engine.generate(prompt, params))
                await asyncio.sleep(rng.random() * 2)
                task.cancel()
                try:
                    await task
                    ended[index] = "finished"
                except asyncio.CancelledError:
                    ended[index] = "cancelled"
            elif rng.random() < 0.5:
                reasons = [d.finish_reason async for d in engine.stream(prompt, params)]
                assert reasons[-1] in ("stop", "length")
                ended[index] = "finished"
            else:
                out = await engine.generate(prompt, params)
                assert out.finished
                ended[index] = "finished"

        async with bc.AsyncEngine(
            model, max_num_seqs=8, n_ctx=1024, check_integrity=True
        ) as engine:
            await asyncio.gather(*(one(engine, index) for index in range(200)))
            await until_idle(engine)
            stats = engine.stats()
        assert len(ended) == 200
        assert sum(stats.num_finished.values()) >= 200 - stats.num_finished["cancelled"]
        assert stats.num_finished["error"] == 0

    asyncio.run(main())
