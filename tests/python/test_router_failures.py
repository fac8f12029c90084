"""Router: replicas that fail under load, and come back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import threading
import time
from collections import Counter

import batchcore as bc
import pytest
from batchcore.errors import (
    DecodeError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    RequestTimeoutError,
)
from batchcore.testing import synthetic_gguf

ONE = bc.SamplingParams(max_tokens=1, ignore_eos=True)
SHORT = bc.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = bc.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
SOON = {"backoff_s": 0.01, "max_backoff_s": 0.02}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small enough that thousands of requests are a matter of seconds."""
    path = tmp_path_factory.mktemp("router") / "model.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


def engine_over(model, **options):
    return bc.Engine(model, **({"max_num_seqs": 2, "n_ctx": 2048, "n_threads": 1} | options))


def router_over(model, count=2, **options):
    defaults = {"max_num_seqs": 2, "n_ctx": 2048, "n_threads": 1, "routing": "round_robin"}
    return bc.Router(model, ["cpu"] * count, **(defaults | SOON | options))


def engine_of(router, index):
    return router._replicas.all[index].link.engine


async def kill(router, index):
    """What a lost device looks like: the C++ engine is closed under everybody's feet."""
    await asyncio.to_thread(engine_of(router, index)._native.close)


async def until(router, condition):
    assert await router._replicas.until(condition, 120)


def states(router):
    return [status.state for status in router.replicas]


class Faulty:
    """A native engine whose requests fail as `error` says, before any token of theirs."""

    def __init__(self, native, error=None):
        self._native = native
        self.error = error or DecodeError("injected", status=-3)
        self.is_faulty = True

    def __getattr__(self, name):
        return getattr(self._native, name)

    def submit(self, *args):
        (channel,) = self._native.submit(*args)
        return [FaultyChannel(channel, self)] if self.is_faulty else [channel]


class FaultyChannel:
    def __init__(self, channel, engine):
        self.id = channel.id
        self._channel = channel
        self._engine = engine

    def take(self):
        update = self._channel.take()
        if update is None:
            return None
        self._engine.abort(self.id)
        return [(0, "", [], [], "error", None)], True, self._engine.error, update[3]


def break_down(router, index, error=None):
    engine = engine_of(router, index)
    engine._native = Faulty(engine._native, error)
    return engine._native


def test_a_replica_killed_under_load(model):
    prompts = [[5, 6, 7 + index] for index in range(24)]
    params = bc.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    endless = bc.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    options = {"max_num_seqs": 4, "n_ctx": 2048, "n_threads": 1}
    with bc.Engine(model, **options) as engine:
        expected = [out.text for out in engine.generate(prompts, params)]

    async def consume(stream):
        return [delta async for delta in stream]

    async def main():
        events = []
        async with router_over(model, **options) as router:
            router.add_observer(events.append)
            streams = [router.stream([3, 4], endless) for _ in range(4)]
            first = await asyncio.gather(*(anext(stream) for stream in streams))
            assert all(delta.token_ids for delta in first)
            doomed = router.replicas[0].outstanding_requests
            assert doomed == 2
            tails = [asyncio.create_task(consume(stream)) for stream in streams]
            router.pause()  # so that the others still wait when it happens
            handles = [await router.submit(prompt, params) for prompt in prompts[:12]]
            tasks = [asyncio.create_task(router.generate(one, params)) for one in prompts[12:]]
            tasks = [*map(asyncio.ensure_future, handles), *tasks]
            await asyncio.sleep(0)  # all are handed in
            assert router.stats().num_open == 28
            await kill(router, 0)
            router.resume()
            outs = await asyncio.gather(*tasks)
            assert [out.text for out in outs] == expected
            assert all(out.metrics.latency_s >= out.metrics.ttft_s for out in outs)
            for task in tails[1::2]:
                task.cancel()
            ends = await asyncio.gather(*tails, return_exceptions=True)
            assert [type(end) for end in ends] == [
                EngineClosedError,
                asyncio.CancelledError,
            ] * 2

            await until(router, lambda: states(router) == ["serving", "serving"])
            stats = router.stats()
            assert stats.num_retries >= 10
            assert [one.status.rebuilds for one in stats.replicas] == [1, 0]
            assert stats.replicas[0].status.failures >= 12
            again = await asyncio.gather(*(router.generate(one, params) for one in prompts[:4]))
            assert [out.text for out in again] == expected[:4]
            assert engine_of(router, 0).stats().num_finished["length"] >= 2
            assert router.stats().num_generated_tokens > stats.num_generated_tokens
            gc.collect()
            assert await router.drain(60)
            assert router.stats().num_finished == {"length": 28, "error": 2, "cancelled": 2}
        assert sorted(event.output.request_id for event in events) == [*range(1, 33)]
        assert Counter(type(event.error) for event in events) == {
            type(None): 30,
            EngineClosedError: 2,
        }

    asyncio.run(main())


def test_replicas_that_fail_at_random_lose_no_request(model):
    async def main():
        rng = random.Random(5)
        events, ended = Counter(), Counter()

        async def one(router, index):
            params = bc.SamplingParams(max_tokens=rng.randint(1, 40), seed=index, ignore_eos=True)
            prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 60))]
            kind = rng.choice(["generate", "stream", "cancel", "timeout", "drop"])
            try:
                if kind == "generate":
                    await router.generate(prompt, params)
                elif kind == "stream":
                    assert [delta async for delta in router.stream(prompt, params)][
                        -1
                    ].finish_reason
                elif kind == "cancel":
                    task = asyncio.create_task(router.generate(prompt, LONG))
                    await asyncio.sleep(rng.random() / 10)
                    task.cancel()
                    await task
                elif kind == "timeout":
                    await router.generate(prompt, params, timeout=rng.random() / 20 + 1e-6)
                else:
                    await router.submit(prompt, LONG)
            except asyncio.CancelledError:
                ended["cancelled"] += 1
            except (RequestTimeoutError, EngineError) as error:
                ended[type(error).__name__] += 1
            else:
                ended["finished"] += 1

        async with router_over(model, count=3) as router:
            router.add_observer(lambda event: events.update([event.output.request_id]))
            tasks = [asyncio.create_task(one(router, index)) for index in range(250)]
            for index in (0, 1, 0, 2):
                await until(router, lambda index=index: states(router)[index] == "serving")
                await kill(router, index)
            await asyncio.gather(*tasks)
            gc.collect()
            assert await router.drain(60)
            stats = router.stats()
            assert ended.total() == 250
            assert set(events.values()) == {1}
            # The others were refused, or cancelled before they were handed in.
            assert stats.num_finished.keys() <= {"stop", "length", "cancelled", "timeout", "error"}
            assert sum(stats.num_finished.values()) == len(events) == max(events)
            assert stats.outstanding_tokens == stats.num_open == 0
            router.resume()
            await until(router, lambda: states(router) == ["serving"] * 3)
            outs = [await router.generate([5], ONE) for _ in range(3)]
            assert all(out.finished for out in outs)

    asyncio.run(main())


def test_requests_that_fail_in_a_row_take_a_replica_out_until_a_probe_succeeds(model):
    async def main():
        with engine_over(model) as one, engine_over(model) as two:
            async with bc.Router(
                engines=[one, two], routing="round_robin", max_failures=2, **SOON
            ) as router:
                fault = break_down(router, 0)
                (await router.generate([5], SHORT))
                assert router.replicas[0].consecutive_failures == 1
                assert states(router) == ["serving", "serving"]
                await router.generate([5], SHORT)  # on 1
                await router.generate([5], SHORT)  # on 0, and then 1
                assert states(router) == ["recovering", "serving"]
                assert (router.replicas[0].failures, router.stats().num_retries) == (2, 2)
                assert "injected" in router.replicas[0].last_error
                probes = sum(one.stats().num_finished.values())
                while sum(one.stats().num_finished.values()) < probes + 2:
                    await router.generate([5], ONE)  # served by the other
                assert states(router) == ["recovering", "serving"]
                fault.is_faulty = False
                await until(router, lambda: states(router) == ["serving", "serving"])
                served = one.stats().num_finished["length"]
                await router.generate([5], ONE)
                await router.generate([5], ONE)
                assert one.stats().num_finished["length"] == served + 1
                assert router.replicas[0].rebuilds == 0

    asyncio.run(main())


def test_a_success_in_between_forgives(model):
    async def main():
        async with router_over(model, max_failures=2) as router:
            fault = break_down(router, 0)
            for _ in range(3):
                fault.is_faulty = True
                await router.generate([5], ONE)  # 0, then 1
                fault.is_faulty = False
                await router.generate([5], ONE)
                await router.generate([5], ONE)
            assert router.replicas[0].failures >= 2
            assert states(router) == ["serving", "serving"]

    asyncio.run(main())


def test_a_failure_of_the_request_s_own_is_not_tried_again(model):
    async def main():
        async with router_over(model) as router:
            break_down(router, 0, EngineError("no token can be chosen"))
            with pytest.raises(EngineError, match="no token"):
                await router.generate([5], ONE)
            assert router.replicas[0].failures == router.stats().num_retries == 0

    asyncio.run(main())


def test_a_request_that_fails_everywhere_fails_with_what_it_met(model):
    async def main():
        events = []
        async with router_over(model, count=4, max_attempts=3) as router:
            router.add_observer(events.append)
            for index in range(4):
                break_down(router, index, DecodeError(f"injected {index}", status=-3))
            with pytest.raises(DecodeError, match="injected 2"):
                await router.generate([5], ONE)
            handle = await router.submit([5], ONE)
            with pytest.raises(DecodeError, match="injected"):
                await handle
            assert handle.output.outputs[0].finish_reason == "error"
            assert router.stats().num_retries == 4
        assert [type(event.error) for event in events] == [DecodeError] * 2

    asyncio.run(main())


def test_tokens_that_nobody_has_seen_do_not_count(model):
    async def main():
        async with router_over(model) as router:
            unread = await router.submit([5], LONG)
            read = await router.submit([5], LONG)  # on 1
            waited = await router.submit([5], LONG)
            seen = read.__aiter__()
            await anext(seen)
            task = asyncio.ensure_future(waited)
            # Both of replica 0 have got tokens, which lie ready.
            while engine_of(router, 0).stats().num_generated_tokens < 8:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await kill(router, 0)
            out = await task
            assert len(out.outputs[0].token_ids) == 1500
            tokens = [token async for delta in unread for token in delta.token_ids]
            assert tokens == unread.output.outputs[0].token_ids
            # Further on the two may part where two tokens are level: their batches differed.
            assert tokens[:200] == out.outputs[0].token_ids[:200]
            assert len(tokens) == 1500
            await until(router, lambda: states(router) == ["serving", "serving"])
            await kill(router, 1)
            # One that was seen fails, where it was not done by then.
            with contextlib.suppress(EngineClosedError):
                async for _ in seen:
                    pass
            assert read.finished

    asyncio.run(main())


def test_a_blocked_event_loop_loses_nothing(model):
    async def main():
        async with router_over(model) as router:
            tasks = [asyncio.create_task(router.generate([5, i], SHORT)) for i in range(20)]
            await asyncio.sleep(0)
            engine_of(router, 0)._native.close()
            time.sleep(0.3)  # noqa: ASYNC251 (that is the point)
            outs = await asyncio.gather(*tasks)
            assert [len(out.outputs[0].token_ids) for out in outs] == [6] * 20

    asyncio.run(main())


def test_all_replicas_down(model, caplog):
    async def main():
        with engine_over(model) as one, engine_over(model) as two:
            router = bc.Router(engines=[one, two], routing="round_robin", **SOON)
            await router.start()
            tasks = [asyncio.create_task(router.generate([5], LONG)) for _ in range(6)]
            await asyncio.sleep(0)
            await asyncio.gather(kill(router, 0), kill(router, 1))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineClosedError] * 6
            with pytest.raises(EngineError):
                await router.generate([5], ONE)
            await until(router, lambda: states(router) == ["closed", "closed"])
            for refused in (router.generate([5], ONE), router.wait_for_capacity()):
                with pytest.raises(EngineClosedError, match="every replica is closed"):
                    await refused
            with pytest.raises(EngineError, match="no replica is in service"):
                await router.warm([5])
            await router.aclose()

    with caplog.at_level(logging.WARNING, "batchcore"):
        asyncio.run(main())
    assert "replica 0 is taken out of service: the engine" in caplog.text  # was, or is closed
    assert "replica 1 is closed for good" in caplog.text


def test_who_waits_for_capacity_sees_a_replica_come_back(model):
    async def main():
        async with router_over(model, count=1) as router:
            prefix = await router.warm([7] * 40)
            task = asyncio.create_task(router.generate([5], LONG))
            await asyncio.sleep(0)
            await kill(router, 0)
            with pytest.raises(EngineClosedError):
                await task
            assert await router.wait_for_capacity(1, timeout=60)
            out = await router.generate([*[7] * 40, 9], ONE)
            assert out.num_cached_tokens == 40  # it was computed again first
            assert router.stats().replicas[0].engine.num_pinned == 1
            prefix.release()
            prefix.release()

    asyncio.run(main())


def test_a_paused_router_s_new_replica_is_paused_too(model):
    async def main():
        async with router_over(model, count=1) as router:
            router.pause()
            await kill(router, 0)
            with pytest.raises(EngineError):
                await router.submit([5], ONE)
            await until(router, lambda: states(router) == ["serving"])
            assert router.stats().replicas[0].engine.is_paused
            task = asyncio.create_task(router.generate([5], ONE))
            await asyncio.sleep(0)
            assert await router.drain(60)
            assert (await task).finished

    asyncio.run(main())


class Scripted:
    """The first replica that there is, with something to do on the way."""

    def __init__(self):
        self.calls = 0
        self.actions = {}

    def choose(self, prompt_token_ids, loads):
        self.calls += 1
        self.actions.pop(self.calls, lambda: None)()
        for index, load in enumerate(loads):
            if load is not None:
                return index
        raise EngineError("none")

    def record(self, prompt_token_ids, replica):
        pass

    def forget(self, replica):
        pass


@pytest.mark.parametrize("when", ["before its turn", "in its turn"])
def test_cancellation_during_a_retry(model, when):
    async def main():
        routing = Scripted()
        events = []
        async with router_over(model, routing=routing) as router:
            router.add_observer(events.append)
            tasks = [asyncio.create_task(router.generate([5], LONG)) for _ in range(3)]
            await asyncio.sleep(0)
            assert router.replicas[0].outstanding_requests == 3
            # The first one's retry is the fourth choice. The third has its turn after that.
            victim = 3 if when == "before its turn" else 1
            routing.actions[4] = lambda: router.abort(victim)
            await kill(router, 0)
            outs = await asyncio.gather(*tasks)
            expected = ["length", "length", "length"]
            expected[victim - 1] = "cancelled"
            assert [out.outputs[0].finish_reason for out in outs] == expected
            assert routing.calls == (5 if victim == 3 else 6)
            assert router.stats().num_finished == {"length": 2, "cancelled": 1}
        assert len(events) == 3

    asyncio.run(main())


def test_a_cancelled_task_cancels_its_retry(model):
    async def main():
        routing = Scripted()
        async with router_over(model, routing=routing) as router:
            task = asyncio.create_task(router.generate([5], LONG))
            await asyncio.sleep(0)
            routing.actions[2] = task.cancel
            await kill(router, 0)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await router.drain(60)
            assert router.stats().num_finished == {"cancelled": 1}
            assert router.stats().outstanding_tokens == 0

    asyncio.run(main())


def test_a_retry_that_finds_no_room_and_one_that_is_out_of_time(model):
    async def main():
        async with router_over(model, max_queued_requests=2, routing=Scripted()) as router:
            fault = break_down(router, 0)
            router.pause()
            queued = [asyncio.create_task(router.generate([5], SHORT)) for _ in range(4)]
            await asyncio.sleep(0)
            assert [status.outstanding_requests for status in router.replicas] == [2, 2]
            engine_of(router, 0).resume()
            failed = await asyncio.gather(*queued[:2], return_exceptions=True)
            assert [type(error) for error in failed] == [QueueFullError] * 2
            assert [type(error.__cause__) for error in failed] == [DecodeError] * 2
            router.resume()
            await asyncio.gather(*queued[2:])

            fault.is_faulty = True
            task = asyncio.create_task(router.generate([5], SHORT, timeout=1e-3))
            await asyncio.sleep(0)
            time.sleep(0.01)  # noqa: ASYNC251 (its time must pass before it fails)
            with pytest.raises(RequestTimeoutError) as raised:
                await task
            assert raised.value.output.outputs[0].finish_reason == "timeout"

    asyncio.run(main())


def test_a_policy_that_is_broken_fails_only_its_request(model):
    async def main():
        routing = Scripted()
        async with router_over(model, routing=routing) as router:
            task = asyncio.create_task(router.generate([5], LONG))
            await asyncio.sleep(0)
            routing.choose = lambda prompt, loads: 7
            await kill(router, 0)
            with pytest.raises(EngineError):
                await task
            with pytest.raises(EngineError, match="chose replica 7"):
                await router.generate([5], ONE)
            del routing.choose
            assert (await router.generate([5], ONE)).finished

    asyncio.run(main())


def test_factories_are_tried_again_until_they_work(model):
    async def main():
        made = []

        def factory(index):
            made.append(index)
            if len(made) < 3:
                raise OSError("no device")
            return engine_over(model)

        with engine_over(model) as one:
            async with bc.Router(engines=[one], engine_factory=factory, **SOON) as router:
                await kill(router, 0)
                with pytest.raises(EngineError):
                    await router.generate([5], ONE)
                await until(router, lambda: states(router) == ["serving"])
                assert made == [0, 0, 0]
                assert router.replicas[0].last_error == "no device"
                assert router.replicas[0].rebuilds == 1
                assert (await router.generate([5], ONE)).finished
                replacement = engine_of(router, 0)
            with pytest.raises(EngineClosedError):  # the router's own
                replacement.generate([[5]], ONE)

    asyncio.run(main())


def test_shutdown_while_a_replica_is_rebuilt(model):
    building, may_go_on = threading.Event(), threading.Event()
    made = []

    def factory(index):
        building.set()
        assert may_go_on.wait(60)
        made.append(engine_over(model))
        return made[0]

    async def main():
        with engine_over(model) as one, engine_over(model) as two:
            router = bc.Router(engines=[one, two], engine_factory=factory, **SOON)
            await router.start()
            await kill(router, 0)
            while not building.is_set():
                await router.generate([5], ONE)
            closing = asyncio.create_task(router.aclose())
            await asyncio.sleep(0)
            may_go_on.set()
            await closing
            assert states(router) == ["closed", "closed"]
            assert two.generate([[5]], ONE)[0].finished
        with pytest.raises(EngineClosedError):
            made[0].generate([[5]], ONE)

    asyncio.run(main())


def test_shutdown_while_a_replica_waits_for_its_next_try(model):
    async def main():
        async with router_over(model, backoff_s=3600, max_backoff_s=3600) as router:
            await kill(router, 0)
            for _ in range(2):
                await router.generate([5], ONE)
            assert states(router) == ["recovering", "serving"]

    asyncio.run(main())
