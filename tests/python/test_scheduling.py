"""Tiers, users, deadlines and what a server does around them, with real models."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time

import batchcore as bc
import pytest
from batchcore.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from batchcore.testing import synthetic_gguf

ONE = bc.SamplingParams(max_tokens=1, ignore_eos=True)
SHORT = bc.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = bc.SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Small enough that thousands of requests are a matter of seconds."""
    path = tmp_path_factory.mktemp("scheduling") / "model.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


def stepped(model, **options):
    defaults = {"max_num_seqs": 1, "n_ctx": 2048, "autostart": False, "check_integrity": True}
    return bc.Engine(model, **(defaults | options))


def order_of_ends(engine, handles):
    ended = []
    while engine.has_work:
        engine.step()
        ended += [name for name, handle in handles if handle.finished and name not in ended]
    return ended


def test_tiers_are_served_in_their_order_by_name_or_number(model):
    with stepped(model) as engine:
        handles = [
            (priority, engine.submit([5, 6, 7], SHORT, priority=priority))
            for priority in ("batch", 7, "standard", "interactive", -9)
        ]
        assert order_of_ends(engine, handles) == [-9, "interactive", "standard", "batch", 7]


def test_names_of_tiers_are_the_engine_s_own(model):
    policy = bc.SchedulingPolicy(tiers=[bc.Tier("free", 1), bc.Tier("paid", 0)])
    with stepped(model, policy=policy) as engine:
        handles = [(tier, engine.submit([5], SHORT, priority=tier)) for tier in ("free", "paid")]
        assert order_of_ends(engine, handles) == ["paid", "free"]
        with pytest.raises(InvalidRequestError, match="'batch', only free, paid"):
            engine.submit([5], SHORT, priority="batch")
        assert not engine.has_work


def test_a_better_tier_takes_the_slot_and_the_other_goes_on_afterwards(model):
    with stepped(model, n_ctx=4096) as engine:
        (alone,) = engine.generate([[5, 6, 7]], SHORT)
        batch = engine.submit([5, 6, 7], LONG, priority="batch")
        for _ in range(5):
            engine.step()
        urgent = engine.submit([5, 6, 7], SHORT, priority="interactive")
        assert order_of_ends(engine, [("batch", batch), ("urgent", urgent)]) == ["urgent", "batch"]
        assert urgent.output.text == alone.text
        assert len(batch.output.outputs[0].token_ids) == 500
        assert engine.stats().num_slot_preemptions == 1


def test_limits_and_reserved_slots(model):
    policy = bc.SchedulingPolicy(
        tiers=[bc.Tier("vip", 0, reserved_seqs=1), bc.Tier("bulk", 1, max_num_seqs=2)]
    )
    with stepped(model, max_num_seqs=4, policy=policy) as engine:
        for _ in range(4):
            engine.submit([5, 6], LONG, priority="bulk")  # dropped below: kept by the list
        handles = [engine.submit([5, 6], LONG, priority="bulk") for _ in range(4)]
        others = [engine.submit([5, 6], LONG, priority=9) for _ in range(4)]
        for _ in range(5):
            engine.step()
        running = {tier.priority: tier.num_running for tier in engine.stats().tiers}
        assert running == {1: 2, 9: 1}
        vip = engine.submit([5, 6], LONG, priority="vip")
        engine.step()
        running = {tier.priority: tier.num_running for tier in engine.stats().tiers}
        assert running == {0: 1, 1: 2, 9: 1}
        assert engine.stats().num_slot_preemptions == 0
        for handle in (*handles, *others, vip):
            handle.cancel()
    with pytest.raises(ConfigError):
        bc.Engine(
            model,
            max_num_seqs=2,
            n_ctx=512,
            policy=bc.SchedulingPolicy(tiers=[bc.Tier("all", 0, reserved_seqs=2)]),
        )


def test_a_flooding_user_does_not_delay_the_others(model):
    with stepped(model) as engine:
        flood = [(f"flood {i}", engine.submit([5, i], SHORT, user="mallory")) for i in range(40)]
        others = [(name, engine.submit([5, 6], SHORT, user=name)) for name in ("alice", "bob")]
        order = order_of_ends(engine, flood + others)
        assert max(order.index("alice"), order.index("bob")) <= 3
        assert len(order) == 42


def test_weights_share_by_what_was_said(model):
    policy = bc.SchedulingPolicy(user_weights={"big": 3.0})
    with stepped(model, policy=policy) as engine:
        handles = [
            ((name, i), engine.submit([5, 6], SHORT, user=name))
            for i in range(40)
            for name in ("big", "small")
        ]
        served = [name for name, _ in order_of_ends(engine, handles)[:40]]
        assert 28 <= served.count("big") <= 32


@pytest.mark.parametrize("name", ["", "alice\n", "\0", "\ud800", "💥" * 200])
def test_users_with_odd_names_are_users(model, name):
    policy = bc.SchedulingPolicy(max_queued_requests_per_user=1, user_weights={name: 2.0})
    with stepped(model, policy=policy) as engine:
        handle = engine.submit([5], SHORT, user=name)
        with pytest.raises(QueueFullError, match="for this user"):
            engine.submit([5], SHORT, user=name)
        other = engine.submit([5], SHORT, user="another one")
        assert handle.result().finished
        assert other.result().finished


def test_ten_thousand_users_leave_no_trace(model):
    with bc.Engine(model, max_num_seqs=16, n_ctx=4096, max_queued_requests=10_001) as engine:
        engine.pause()
        handles = [engine.submit([5, 6, 7], ONE, user=f"user {i}") for i in range(10_000)]
        engine.resume()
        assert all(handle.result().outputs[0].finish_reason == "length" for handle in handles)
        stats = engine.stats()
        assert stats.num_active_users == 0
        assert stats.num_known_users <= 4097
        computed = stats.num_prompt_tokens - stats.num_cached_tokens
        assert sum(stats.service) == computed + 2 * stats.num_generated_tokens
        assert stats.num_generated_tokens == 10_000


@pytest.mark.parametrize("bad", [{"timeout": float("nan")}, {"timeout": -1}, {"timeout": "1"}])
@pytest.mark.parametrize("how", ["submit", "generate"])
def test_a_bad_timeout_is_refused_and_nothing_is_queued(model, bad, how):
    with stepped(model) as engine:
        for name, value in bad.items():
            for option in (name, f"queue_{name}"):
                with pytest.raises(InvalidRequestError, match=f"{option} must be above 0"):
                    getattr(engine, how)([5, 6], SHORT, **{option: value})
        assert not engine.has_work
        assert engine.stats().num_refused == 0


def test_a_queue_timeout_ends_who_waits_and_nobody_who_runs(model):
    with bc.Engine(model, max_num_seqs=1, n_ctx=2048) as engine:
        running = engine.submit([5, 6], LONG, queue_timeout=60)
        deltas = iter(running)
        next(deltas)
        engine.pause()
        late = engine.submit([5, 6], SHORT, queue_timeout=0.05)
        with pytest.raises(RequestTimeoutError) as caught:
            late.result()
        assert caught.value.output.outputs[0].finish_reason == "timeout"
        assert caught.value.output.metrics.queue_s is None
        assert len(running.result().outputs[0].token_ids) == 500
        # The slot is free at once.
        assert engine.stats().num_running == 0


def test_a_stream_that_is_too_late_keeps_what_there_was(model):
    with bc.Engine(model, max_num_seqs=1, n_ctx=4096) as engine:
        endless = bc.SamplingParams(max_tokens=2000, ignore_eos=True)
        deltas = list(engine.stream([5, 6], endless, timeout=0.1))
        assert deltas[-1].finish_reason == "timeout"
        assert 0 < sum(len(delta.token_ids) for delta in deltas) < 2000


def test_shedding_refuses_who_would_wait_too_long(model):
    policy = bc.SchedulingPolicy(shed=True)
    with stepped(model, policy=policy) as engine:
        handles = [engine.submit([5] * 50, SHORT) for _ in range(60)]
        for _ in range(120):
            engine.step()  # until it knows how fast the queue moves
        with pytest.raises(QueueFullError, match="longer than its timeout") as caught:
            handles += [engine.submit([5] * 50, SHORT, timeout=0.02) for _ in range(500)]
        assert caught.value.retry_after_s > 0
        assert engine.stats().num_shed == 1
        for handle in handles:
            handle.cancel()


def test_drain_finishes_what_there_is_and_refuses_more(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=4096) as engine:
        engine.pause()
        handles = [engine.submit([5, 6], SHORT) for _ in range(6)]
        assert engine.stats().is_paused
        assert engine.drain()
        assert all(handle.result().finished for handle in handles)
        with pytest.raises(EngineClosedError, match="drained"):
            engine.submit([5], SHORT)
        with pytest.raises(EngineClosedError, match="drained"):
            engine.wait_for_capacity()
        assert engine.stats().is_draining
        engine.resume()
        assert engine.generate([[5]], SHORT)[0].finished
        engine.pause()
        stuck = engine.submit([5, 6], LONG)
        assert not engine.drain(timeout=1e-9)
        assert stuck.result().finished  # drain ends a pause


def test_an_engine_that_is_stepped_by_hand_drains_and_waits_by_stepping(model):
    with stepped(model, max_queued_requests=1) as engine:
        handle = engine.submit([5, 6], SHORT)
        assert engine.wait_for_capacity()
        assert engine.drain()
        assert not engine.has_work
        assert handle.result().finished


def test_waiting_for_capacity_replaces_trying_again(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=4096, max_queued_requests=3) as engine:
        done = []

        def client(number):
            for _ in range(10):
                while True:
                    engine.wait_for_capacity(2, user=str(number))
                    try:
                        handle = engine.submit([5, number + 6], SHORT, user=str(number))
                        break
                    except QueueFullError:
                        continue  # somebody else was faster
                done.append(handle.result())

        threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 60
        with pytest.raises(InvalidRequestError):
            engine.wait_for_capacity(timeout=float("nan"))
        with pytest.raises(ConfigError):
            engine.wait_for_capacity(-1)


def test_waiting_for_capacity_on_an_event_loop(model):
    async def main():
        async with bc.AsyncEngine(
            model, max_num_seqs=2, n_ctx=4096, max_queued_requests=2
        ) as engine:
            engine.pause()
            first = [await engine.submit([5, 6], SHORT) for _ in range(2)]
            assert not await engine.wait_for_capacity(timeout=0.05)

            async def client(number):
                while True:
                    await engine.wait_for_capacity(2)
                    try:
                        return await engine.generate([5, number], SHORT)
                    except QueueFullError:
                        continue

            clients = [asyncio.create_task(client(6 + i)) for i in range(20)]
            await asyncio.sleep(0)
            engine.resume()
            outputs = await asyncio.gather(*clients, *first)
            assert all(output.finished for output in outputs)
            assert await engine.drain(timeout=30)
            with pytest.raises(EngineClosedError):
                await engine.wait_for_capacity()
            engine.resume()
            engine.pause()
            kept = [await engine.submit([5, 6], SHORT) for _ in range(2)]
            waiting = asyncio.create_task(engine.wait_for_capacity())
            await asyncio.sleep(0)
            await engine.aclose()
            with pytest.raises(EngineClosedError):
                await waiting
            for handle in kept:
                with pytest.raises(EngineClosedError):
                    await handle

    asyncio.run(main())


def test_a_hook_changes_and_refuses_what_is_submitted(model):
    seen = []

    def admit(submission):
        seen.append(submission)
        if submission.user == "banned":
            raise InvalidRequestError("no more for you")
        if submission.user == "guest":
            return dataclasses.replace(
                submission, priority="batch", params=dataclasses.replace(SHORT, max_tokens=2)
            )
        return None

    with stepped(model, on_submit=admit) as engine:
        guest = engine.submit([5, 6], LONG, user="guest")
        member = engine.submit([5, 6], SHORT, user="member")
        assert order_of_ends(engine, [("guest", guest), ("member", member)]) == ["member", "guest"]
        assert len(guest.output.outputs[0].token_ids) == 2
        with pytest.raises(InvalidRequestError, match="no more for you"):
            engine.generate([[5], [6]], SHORT, user="banned")
        assert not engine.has_work
        assert [one.user for one in seen] == ["guest", "member", "banned"]
        engine.on_submit = None
        engine.warm([5, 6, 7]).release()


def test_observers_hear_of_every_end_once(model, caplog):
    events = []

    def broken(event):
        raise RuntimeError("no")

    with bc.Engine(model, max_num_seqs=1, n_ctx=2048) as engine:
        engine.add_observer(broken)
        remove = engine.add_observer(events.append)
        with caplog.at_level(logging.ERROR, "batchcore"):
            engine.generate([[5, 6]], SHORT, user="a", priority="batch")
        assert "an observer of finished requests failed" in caplog.text
        assert events[0].submission.user == "a"
        assert events[0].submission.priority == "batch"
        assert events[0].output.finished
        assert abs(events[0].submitted_at - time.time()) < 3600
        list(engine.stream([5, 6], SHORT, user="b"))
        cancelled = engine.submit([5, 6], LONG, user="c")
        cancelled.cancel()
        cancelled.result()
        dropped = engine.submit([5, 6], LONG, user="d")
        del dropped
        failed = engine.submit([5, 6], LONG, user="e")
        engine.close()
        with pytest.raises(EngineClosedError):
            failed.result()
        remove()
    assert [event.submission.user for event in events] == ["a", "b", "c", "d", "e"]
    assert [event.output.outputs[0].finish_reason for event in events[:4]] == [
        "length",
        "length",
        "cancelled",
        "cancelled",
    ]
    assert [event.error is None for event in events] == [True, True, True, True, False]


def test_a_slow_consumer_holds_nobody_up_and_loses_nothing(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=4096) as engine:
        slow = engine.submit([5, 6], LONG)
        deltas = iter(slow)
        first = next(deltas)
        # Others come and go, and it goes on itself, while nobody reads it.
        for _ in range(20):
            assert engine.generate([[5, 6, 7]], SHORT)[0].finished
        assert engine.drain()
        rest = list(deltas)
        assert len(first.token_ids) + sum(len(delta.token_ids) for delta in rest) == 500
        # What was not read in time comes in one piece, not one per token.
        assert len(rest) <= 2


def test_a_blocked_event_loop_holds_up_nobody_but_itself(model):
    async def main():
        async with bc.AsyncEngine(model, max_num_seqs=4, n_ctx=4096) as engine:
            handle = await engine.submit([5, 6], LONG)
            others = [engine.engine.submit([5, i], SHORT) for i in range(8)]
            for other in others:
                other.result()  # blocks the loop
            assert engine.engine.drain()
            deltas = [delta async for delta in handle]
            assert sum(len(delta.token_ids) for delta in deltas) == 500
            assert len(deltas) <= 2

    asyncio.run(main())


def test_wall_clocks_that_jump_change_nothing(model, monkeypatch):
    with bc.Engine(model, max_num_seqs=1, n_ctx=2048) as engine:
        handle = engine.submit([5, 6], SHORT, timeout=60, queue_timeout=60)
        monkeypatch.setattr(time, "time", lambda: -1e9)
        output = handle.result()
        assert output.outputs[0].finish_reason == "length"
        assert 0 <= output.metrics.queue_s <= output.metrics.ttft_s <= output.metrics.latency_s


def test_an_engine_that_finds_its_batch_size(model):
    with bc.Engine(model, max_num_seqs="auto", n_ctx=4096, target_itl_ms=1e-3) as engine:
        assert engine.max_num_seqs == 16
        engine.generate([[5, i] for i in range(64)], bc.SamplingParams(max_tokens=40))
        stats = engine.stats()
        assert 1 <= stats.batch_size_limit < 16  # no token comes within a microsecond
        assert stats.num_batch_size_decreases > 0
    with pytest.raises(ConfigError):
        bc.Engine(model, max_num_seqs="many", n_ctx=512)


def test_an_idle_engine_may_wait_for_company(model):
    with bc.Engine(model, max_num_seqs=4, n_ctx=2048, max_wait_ms=60_000) as engine:
        handles = [engine.submit([5, i], SHORT) for i in range(3)]
        assert engine.stats().num_running == 0
        handles.append(engine.submit([5, 3], SHORT))  # the batch is full
        assert all(handle.result().finished for handle in handles)
        starts = [handle.output.metrics.queue_s for handle in handles]
        assert starts == sorted(starts, reverse=True)
    for bad in (-1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ConfigError, match="max_wait_ms"):
            bc.Engine(model, n_ctx=512, max_wait_ms=bad)


def test_who_interrupts_a_warm_up_leaves_nothing_pinned(model, monkeypatch):
    with bc.Engine(model, max_num_seqs=2, n_ctx=2048) as engine:
        real = bc.RequestHandle.result

        def interrupted(handle):
            real(handle)
            raise KeyboardInterrupt

        monkeypatch.setattr(bc.RequestHandle, "result", interrupted)
        for _ in range(5):  # more than may be pinned at a time
            with pytest.raises(KeyboardInterrupt):
                engine.warm([5, 6, 7])
        monkeypatch.undo()
        engine.warm([5, 6, 7]).release()

    async def main():
        async with bc.AsyncEngine(model, max_num_seqs=2, n_ctx=2048) as engine:
            await engine.start()
            for number in range(5):
                task = asyncio.create_task(engine.warm([50 + number] * 1200))
                await asyncio.sleep(0)
                while not engine.stats().num_pinned and not task.done():
                    time.sleep(0.001)  # noqa: ASYNC251 - so that it has ended, and the task doesn't know
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            (await engine.warm([5, 6, 7])).release()

    asyncio.run(main())


def test_statistics_have_what_was_measured(model):
    with bc.Engine(model, max_num_seqs=2, n_ctx=2048) as engine:
        assert engine.stats().latencies.ttft.count == 0
        outputs = engine.generate([[5, i, 7] for i in range(6)], SHORT)
        stats = engine.stats()
        assert stats.latencies.queue.count == stats.latencies.ttft.count == 6
        assert stats.latencies.e2e.count == 6
        assert stats.latencies.itl.count == 18
        slowest = max(output.metrics.latency_s for output in outputs)
        assert stats.latencies.e2e.quantile(1.0) == pytest.approx(slowest, rel=1 / 14)
        assert stats.latencies.e2e.sum == pytest.approx(
            sum(output.metrics.latency_s for output in outputs)
        )
        assert stats.step_tokens.count == stats.num_steps
        assert stats.step_tokens.sum == stats.num_prefill_tokens + stats.num_decode_rows
