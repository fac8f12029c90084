"""Router: one API over several engines, while all of them work."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from types import SimpleNamespace

import batchcore as bc
import pytest
from batchcore.errors import (
    ConfigError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
    RequestTimeoutError,
)
from batchcore.routing import routed_request
from batchcore.routing.devices import Device, default_devices, find_device, threads_of
from batchcore.routing.routed_request import RoutedRequest
from batchcore.testing import synthetic_gguf

ONE = bc.SamplingParams(max_tokens=1, ignore_eos=True)
SHORT = bc.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = bc.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small enough that thousands of requests are a matter of seconds."""
    path = tmp_path_factory.mktemp("router") / "model.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


def router_over(model, count=2, routing="round_robin", **options):
    defaults = {"max_num_seqs": 2, "n_ctx": 2048, "n_threads": 1}
    return bc.Router(model, ["cpu"] * count, routing=routing, **(defaults | options))


def engine_over(model, **options):
    return bc.Engine(model, **({"max_num_seqs": 2, "n_ctx": 2048, "n_threads": 1} | options))


async def all_ended(router):
    """Every request has ended in its engine too, so that nothing holds a slot."""
    assert await router.drain(60)
    router.resume()


def outstanding(router):
    return [(one.outstanding_requests, one.outstanding_tokens) for one in router.replicas]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_it_generates_as_an_engine_does(loop, smollm2):
    prompts = [f"Number {index} is" for index in range(6)]
    params = bc.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with bc.Engine(smollm2, max_num_seqs=3, n_ctx=512, n_threads=1) as engine:
        expected = [out.text for out in engine.generate(prompts, params)]

    async def main():
        events = []
        async with router_over(smollm2, n_ctx=512, max_num_seqs=3) as router:
            router.add_observer(events.append)
            assert router.model is smollm2
            outs = await asyncio.gather(*(router.generate(prompt, params) for prompt in prompts))
            assert [out.text for out in outs] == expected
            assert [out.metrics.latency_s > 0 for out in outs] == [True] * 6
            deltas = [delta async for delta in router.stream(prompts[3], params)]
            assert "".join(delta.text for delta in deltas) == expected[3]
            handle = await router.submit(prompts[4], params)
            assert isinstance(handle, bc.AsyncRequestHandle)
            assert (await handle) is handle.output
            assert handle.output.text == expected[4]
            assert handle.finished
            assert {delta.request_id for delta in deltas} == {handle.id - 1}
            stats = router.stats()
        assert sorted(event.output.request_id for event in events) == [*range(1, 9)]
        assert stats.num_finished == {"length": 8}
        assert stats.num_generated_tokens == 64
        assert [one.engine.num_finished["length"] for one in stats.replicas] == [4, 4]
        assert stats.num_open == stats.num_retries == stats.outstanding_tokens == 0

    (asyncio if loop == "asyncio" else pytest.importorskip("uvloop")).run(main())


def test_several_completions_logprobs_and_chunks_that_nobody_fetched_in_time(model):
    params = bc.SamplingParams(max_tokens=20, n=2, seed=1, logprobs=2, ignore_eos=True)

    async def main():
        async with router_over(model) as router:
            whole = await router.generate([5, 6, 7], params)
            late = await router.submit([5, 6, 7], params)
            await all_ended(router)  # before the first is read
            deltas = [delta async for delta in late]
            assert sorted(delta.index for delta in deltas) == [0, 1]
            assert [one.token_ids for one in late.output.outputs] == [
                one.token_ids for one in whole.outputs
            ]
            for delta in deltas:
                assert len(delta.token_ids) == len(delta.logprobs) == 20
                assert [one.token for one in delta.logprobs] == delta.token_ids
                assert delta.finish_reason == "length"
            assert late.output.text == whole.text

    asyncio.run(main())


@pytest.mark.parametrize("how", ["task", "iterator", "handle", "drop", "abort", "timeout"])
def test_whoever_stops_listening_frees_the_slot(model, how):
    async def main():
        events = []
        async with router_over(model) as router:
            router.add_observer(events.append)
            if how == "task":
                task = asyncio.create_task(router.generate([5], LONG))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "iterator":
                stream = router.stream([5], LONG)
                await anext(stream)
                await stream.aclose()
            elif how in ("handle", "abort"):
                handle = await router.submit([5], LONG)
                handle.cancel() if how == "handle" else router.abort(handle.id)
                assert (await handle).outputs[0].finish_reason == "cancelled"
            elif how == "drop":
                handle = await router.submit([5], LONG)
                del handle
                gc.collect()
            else:
                with pytest.raises(RequestTimeoutError) as raised:
                    await router.generate([5], LONG, timeout=1e-6)
                assert raised.value.output.finished
            await all_ended(router)
            gc.collect()
            assert outstanding(router) == [(0, 0), (0, 0)]
            assert router.stats().num_active_cells == 0
            reason = "timeout" if how == "timeout" else "cancelled"
            assert router.stats().num_finished == {reason: 1}
        # A task that ended before it had submitted has nothing to tell.
        assert [event.output.outputs[0].finish_reason for event in events] == [reason]

    asyncio.run(main())


def test_outstanding_tokens_are_those_still_to_compute(model):
    async def main():
        async with router_over(model, routing="least_outstanding") as router:
            router.pause()
            big = await router.submit([5] * 10, bc.SamplingParams(max_tokens=90))
            small = [await router.submit([5] * 4, bc.SamplingParams(max_tokens=6)) for _ in "123"]
            assert outstanding(router) == [(1, 100), (3, 30)]
            assert router.stats().outstanding_tokens == 130
            for handle in (big, *small):
                handle.cancel()
                await handle
            assert outstanding(router) == [(0, 0), (0, 0)]

            handle = await router.submit([5] * 10, LONG)
            router.resume()
            deltas = handle.__aiter__()
            await anext(deltas)
            assert outstanding(router)[0][1] < 1500  # the prompt is done, and a token
            await deltas.aclose()

    asyncio.run(main())


def test_prefixes_stay_together_and_cached_tokens_are_no_load(model):
    async def main():
        policy = bc.PrefixAware(block_tokens=8, max_imbalance_tokens=50)
        async with router_over(model, routing=policy) as router:
            router.pause()
            systems = [[7] * 64, [9] * 64]
            handles = [await router.submit([*systems[index % 2], index], ONE) for index in range(8)]
            # 66 tokens, and then only what follows the 64 of the system prompt.
            assert outstanding(router) == [(4, 66 + 3 * 2)] * 2
            router.resume()
            outs = [await handle for handle in handles]
            assert sum(out.num_cached_tokens > 0 for out in outs) >= 2

    asyncio.run(main())


def test_the_next_best_replica_is_asked_where_one_is_full(model):
    async def main():
        routing = bc.LeastOutstanding()
        with engine_over(model, max_queued_requests=1) as one:
            async with bc.AsyncEngine(
                model, n_ctx=2048, n_threads=1, max_queued_requests=2, max_num_seqs=2
            ) as two:
                async with bc.Router(engines=[one, two], routing=routing) as router:
                    router.pause()
                    handles = [await router.submit([5], SHORT) for _ in range(3)]
                    # By load the last one's place was 0, which had no room.
                    assert [status.outstanding_requests for status in router.replicas] == [1, 2]
                    with pytest.raises(QueueFullError) as raised:
                        await router.submit([5], SHORT)
                    assert raised.value.retry_after_s > 0
                    assert router.stats().num_refused == 1
                    assert not await router.wait_for_capacity(1, timeout=0.01)
                    waiting = asyncio.create_task(router.wait_for_capacity(1))
                    await asyncio.sleep(0)
                    handles[1].cancel()
                    assert await waiting
                    handles.append(await router.submit([5], SHORT))
                    router.resume()
                    await asyncio.gather(*handles)
                    assert [status.failures for status in router.replicas] == [0, 0]
                # Handed in, and so still open.
                assert (await two.generate([5], ONE)).finished
            assert one.generate([[5]], ONE)[0].finished

    asyncio.run(main())


def test_of_all_that_are_full_the_first_with_room_says_when(model):
    async def main():
        async with router_over(model, count=3, max_queued_requests=1) as router:
            router.pause()
            handles = [await router.submit([5], SHORT) for _ in range(3)]
            times = iter([3.0, 1.5, 2.0])

            class Full:
                def __init__(self, native):
                    self.native = native

                def __getattr__(self, name):
                    return getattr(self.native, name)

                def submit(self, *args):
                    raise QueueFullError("full", capacity=1, retry_after_s=next(times))

            for replica in router._replicas.all:
                replica.link.engine._native = Full(replica.link.engine._native)
            with pytest.raises(QueueFullError) as raised:
                await router.submit([5], SHORT)
            assert raised.value.retry_after_s == 1.5
            del handles

    asyncio.run(main())


def test_requests_that_can_not_be_served_count_against_nobody(model):
    async def main():
        async with router_over(model) as router:
            for options in ({"priority": "none"}, {"timeout": -1}, {"user": "x" * 300}):
                with pytest.raises(InvalidRequestError):
                    await router.submit([5], SHORT, **options)
            with pytest.raises(InvalidRequestError):
                await router.submit([5] * 5000, SHORT)
            with pytest.raises(InvalidRequestError):
                await router.submit([], SHORT)
            assert [status.failures for status in router.replicas] == [0, 0]
            assert router.stats().num_open == 0

    asyncio.run(main())


def test_the_admission_hook_is_called_once_per_request(model):
    async def main():
        seen = []

        def hook(submission):
            seen.append(submission.user)
            if submission.user == "mallory":
                raise InvalidRequestError("no")
            return dataclasses.replace(submission, params=ONE)

        async with router_over(model, on_submit=hook) as router:
            assert len((await router.generate([5], LONG, user="alice")).outputs[0].token_ids) == 1
            with pytest.raises(InvalidRequestError, match="no"):
                await router.generate([5], LONG, user="mallory")
        assert seen == ["alice", "mallory"]

    asyncio.run(main())


def test_drain_pause_and_resume(model):
    async def main():
        async with router_over(model) as router:
            router.pause()
            waiting = [asyncio.create_task(router.generate([5], SHORT)) for _ in range(4)]
            await asyncio.sleep(0)
            assert await router.drain(60)
            assert [(await task).finished for task in waiting] == [True] * 4
            for refused in (router.submit([5], SHORT), router.wait_for_capacity()):
                with pytest.raises(EngineClosedError, match="drained"):
                    await refused
            router.resume()
            handle = await router.submit([5], LONG)
            assert not await router.drain(0.001)
            handle.cancel()
            assert await router.drain()

    asyncio.run(main())


def test_an_engine_that_somebody_else_drains_is_left_alone(model):
    async def main():
        with engine_over(model) as one, engine_over(model) as two:
            async with bc.Router(engines=[one, two], routing="round_robin") as router:
                one.drain()
                outs = [await router.generate([5], ONE) for _ in range(4)]
                assert all(out.finished for out in outs)
                assert [status.state for status in router.replicas] == ["serving", "serving"]
                assert two.stats().num_finished["length"] == 4
                two.drain()
                with pytest.raises(EngineClosedError, match="drained"):
                    await router.generate([5], ONE)
                with pytest.raises(EngineClosedError, match="drained"):
                    await router.wait_for_capacity()
                one.resume()
                assert await router.wait_for_capacity()
                assert (await router.generate([5], ONE)).finished

    asyncio.run(main())


def test_warm_keeps_a_prefix_on_every_replica(model):
    async def main():
        async with router_over(model) as router:
            prompt = [7] * 40
            with await router.warm(prompt) as prefix:
                assert prefix.num_tokens == 40
                assert [one.engine.num_pinned for one in router.stats().replicas] == [1, 1]
                outs = [await router.generate([*prompt, 9], ONE) for _ in range(2)]
                assert [out.num_cached_tokens for out in outs] == [40, 40]
            await router.generate([5], ONE)
            await router.generate([5], ONE)
            assert [one.engine.num_pinned for one in router.stats().replicas] == [0, 0]
            with pytest.raises(InvalidRequestError):
                await router.warm([5] * 5000)
            assert router._replicas.prefixes == []

    asyncio.run(main())


def test_closing_ends_what_is_in_flight(model):
    async def main():
        router = router_over(model)
        await router.start()
        tasks = [asyncio.create_task(router.generate([5], LONG)) for _ in range(7)]
        waiter = asyncio.create_task(router.wait_for_capacity(10**9))
        await asyncio.sleep(0)
        await router.aclose()
        await router.aclose()
        results = await asyncio.gather(*tasks, waiter, return_exceptions=True)
        assert [type(result) for result in results] == [EngineClosedError] * 8
        for call in (router.start, router.drain):
            with pytest.raises(EngineClosedError):
                await call()
        assert [status.state for status in router.replicas] == ["closed", "closed"]

        with engine_over(model) as engine:
            async with bc.Router(engines=[engine]) as router:
                handle = await router.submit([5], LONG)
            assert (await handle).outputs[0].finish_reason == "cancelled"

    asyncio.run(main())


def test_misuse_is_said(model):
    router = router_over(model)
    for call in (router.pause, router.resume, lambda: router.model):
        with pytest.raises(EngineError, match="start"):
            call()
    asyncio.run(router.start())
    with pytest.raises(EngineError, match="another event loop"):
        asyncio.run(router.generate([5]))
    for replica in router._replicas.all:
        replica.link.engine.close()
    with pytest.raises(ModelLoadError):
        asyncio.run(bc.Router("missing.gguf", ["cpu", "cpu"]).start())
    with engine_over(model, autostart=False) as stepped, pytest.raises(ConfigError, match="own"):
        asyncio.run(bc.Router(engines=[stepped]).start())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "x", "engines": []},
        {"engines": []},
        {"engines": ["model.gguf"]},
        {"model": "x", "devices": "cpu"},
        {"model": "x", "devices": []},
        {"model": "x", "devices": ["cpu", "npu:0"]},
        {"model": "x", "engine_factory": print},
        {"model": "x", "devices": ["cpu"], "routing": "random"},
        {"model": "x", "devices": ["cpu"], "max_attempts": 0},
        {"model": "x", "devices": ["cpu"], "backoff_s": 0},
        {"model": "x", "devices": ["cpu"], "backoff_s": 2, "max_backoff_s": 1},
    ],
)
def test_what_can_not_work_is_refused(options):
    with pytest.raises(ConfigError):
        bc.Router(**options)


FOUND = [
    {"name": "CUDA0", "type": "gpu", "backend": "CUDA"},
    {"name": "CUDA1", "type": "gpu", "backend": "CUDA"},
    {"name": "Vulkan0", "type": "igpu", "backend": "Vulkan"},
    {"name": "BLAS", "type": "accel", "backend": "BLAS"},
    {"name": "CPU", "type": "cpu", "backend": "CPU"},
]


@pytest.mark.parametrize(
    ("name", "ggml_name"),
    [
        ("cpu", "CPU"),
        ("CPU", "CPU"),
        ("cuda:0", "CUDA0"),
        ("CUDA:1", "CUDA1"),
        ("CUDA1", "CUDA1"),
        ("vulkan:0", "Vulkan0"),
    ],
)
def test_names_of_devices(name, ggml_name):
    device = find_device(name, FOUND)
    assert device == Device(name, ggml_name)
    assert device.is_cpu == (ggml_name == "CPU")


def test_unknown_devices_are_refused_with_those_there_are():
    for name in ("cuda:2", "BLAS", "gpu", ""):
        with pytest.raises(ConfigError, match="have cpu, cuda:0, cuda:1, vulkan:0"):
            find_device(name, FOUND)
    with pytest.raises(ConfigError, match=r"have cpu$"):
        find_device("cuda:0", [FOUND[-1]])
    assert default_devices(FOUND) == ["cuda:0", "cuda:1", "vulkan:0"]
    assert default_devices([FOUND[-1]]) == ["cpu"]


def test_a_loaded_model_is_for_one_device(model, monkeypatch):
    monkeypatch.setattr("batchcore._core.devices", lambda: FOUND)
    with pytest.raises(ConfigError, match="one device"):
        bc.Router(model, ["cpu", "cuda:0"])


def test_replicas_on_the_cpu_share_out_the_cores():
    cpu, gpu = Device("cpu", "CPU"), Device("cuda:0", "CUDA0")
    assert threads_of([cpu, cpu, gpu, cpu], 8) == [3, 3, None, 2]
    assert threads_of([cpu, cpu, cpu], 2) == [1, 1, 1]
    assert threads_of([cpu, gpu], 8) == [None, None]


def test_replicas_of_one_device_share_their_weights(model):
    async def main():
        async with bc.Router(model.path, ["cpu", "CPU"], n_ctx=512, max_num_seqs=2) as router:
            one, two = router._replicas.engines()
            assert one.model is two.model
            assert [status.name for status in router.replicas] == ["0/cpu", "1/CPU"]

    asyncio.run(main())


def test_what_is_left_of_the_timeouts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(routed_request, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def request(**timeouts):
        submission = bc.Submission([1], ONE, **timeouts)
        made = RoutedRequest(1, submission, streams=True)
        assert made.remaining() is submission
        made.num_attempts = 1
        return made

    def failed(admitted):
        return ([], True, EngineError("x"), (99.0, admitted, 0.0, 102.0, 0, 0, 0, 0))

    one, queued, admitted = (request(timeout=5.0, queue_timeout=3.0) for _ in range(3))
    queued.restart(failed(0.0))
    admitted.restart(failed(100.5))
    now[0] = 102.0
    assert (queued.remaining().timeout, queued.remaining().queue_timeout) == (3.0, 1.0)
    assert (admitted.remaining().timeout, admitted.remaining().queue_timeout) == (3.0, None)
    now[0] = 103.0
    assert queued.remaining() is None
    assert admitted.remaining().timeout == 2.0
    now[0] = 105.0
    assert one.remaining() is admitted.remaining() is None
    assert request().remaining().timeout is None
