"""Log lines of an engine: what they say, when they come, and that they can't be forged."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from pathlib import Path

import batchcore as bc
import pytest
from batchcore.errors import ConfigError, EngineClosedError, EngineError
from batchcore.observe import log_stats
from batchcore.observe.lines import _since
from batchcore.stats import Histogram
from batchcore.testing import synthetic_gguf

SHORT = bc.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = bc.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
DOC = Path(__file__).parents[2] / "docs" / "observability.md"
NEVER_S = 3600.0
GIVE_UP_S = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small enough that a request is a matter of milliseconds."""
    path = tmp_path_factory.mktemp("observe") / "tiny.gguf"
    return bc.Model(synthetic_gguf(path, n_layer=1, n_embd=64))


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[logging.LogRecord] = []
        self.has_some = threading.Event()

    def emit(self, record):
        self.all.append(record)
        self.has_some.set()

    @property
    def lines(self):
        return [record.getMessage() for record in self.all]

    @property
    def values(self):
        """As a JSON formatter would write them."""
        return [json.loads(json.dumps(one.batchcore, allow_nan=False)) for one in self.all]


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def logger(records):
    logger = logging.Logger("observed", logging.INFO)  # noqa: LOG001
    logger.addHandler(records)
    return logger


def small(model, **options):
    return bc.Engine(model, **({"max_num_seqs": 2, "n_ctx": 512, "n_threads": 1} | options))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batchcore-stats"]


def test_a_line_says_what_happened_in_its_interval(tiny, logger, records):
    with small(tiny) as engine:
        engine.generate([[5, 6, 7]] * 2, SHORT)  # before: not to be counted
        with log_stats(engine, interval_s=NEVER_S, logger=logger):
            engine.generate([list(range(5, 13))] * 3, SHORT)
        assert threads() == []
    (values,) = records.values
    (line,) = records.lines
    assert records.all[0].levelno == logging.INFO
    assert values["event"] == "stats"
    assert values["num_running"] == values["num_waiting"] == 0
    interval_s = values["interval_s"]
    assert values["prompt_tokens_per_s"] * interval_s == pytest.approx(24)
    assert values["generated_tokens_per_s"] * interval_s == pytest.approx(24)
    assert values["num_finished"]["length"] == 3
    assert values["kv_cache_usage"] == 0
    assert 0 < values["prefix_hit_rate"] < 1
    assert 0 < values["ttft_p50_s"] <= values["ttft_p95_s"]
    assert 0 < values["itl_p50_s"] <= values["itl_p95_s"]
    assert values["num_refused"] == values["num_preemptions"] == 0
    assert values["num_steps"] > 0
    for words in ("running 0, waiting 0", "tokens/s", "TTFT p50 ", "finished 3, refused 0"):
        assert words in line


def test_nothing_is_said_while_nothing_is_done(tiny, logger, records):
    with small(tiny) as engine:
        engine.generate([[5, 6, 7]], SHORT)
        with log_stats(engine, interval_s=NEVER_S, logger=logger):
            pass
    assert records.all == []


def test_lines_come_while_the_engine_works_or_waits(tiny, logger, records):
    with small(tiny) as engine:
        engine.pause()
        handle = engine.submit([5, 6, 7], SHORT)
        with log_stats(engine, interval_s=0.01, logger=logger):
            while not any(values["num_waiting"] for values in records.values):
                assert records.has_some.wait(GIVE_UP_S)
            engine.resume()
            handle.result()
    assert sum(values["num_finished"]["length"] for values in records.values) == 1
    first = records.values[0]
    assert (first["num_running"], first["num_waiting"]) == (0, 1)
    # A percentile of nothing is nothing, in JSON too.
    assert first["ttft_p50_s"] is first["itl_p95_s"] is None
    assert "TTFT p50 - p95 -" in records.lines[0]


def test_refusals_are_activity(tiny, logger, records):
    with small(tiny, max_queued_requests=1, autostart=False) as engine:
        with log_stats(engine, interval_s=NEVER_S, logger=logger):
            handle = engine.submit([5], SHORT)
            with pytest.raises(bc.errors.QueueFullError):
                engine.submit([5], SHORT)
        handle.cancel()
    assert records.values[0]["num_refused"] == 1


def test_slow_requests_have_a_line_each(tiny, logger, records):
    with small(tiny) as engine:
        with log_stats(engine, interval_s=NEVER_S, slow_request_s=0.0, logger=logger):
            (output,) = engine.generate([[5, 6, 7]], SHORT, user="alice", priority="batch")
        assert engine._observers == ()
        engine.generate([[5, 6, 7]], SHORT)
    slow, stats = records.all
    assert slow.levelno == logging.WARNING
    assert stats.levelno == logging.INFO
    metrics = output.metrics
    assert records.values[0] == {
        "event": "slow_request",
        "request_id": output.request_id,
        "latency_s": metrics.latency_s,
        "queue_s": metrics.queue_s,
        "ttft_s": metrics.ttft_s,
        "tpot_s": metrics.tpot_s,
        "num_prompt_tokens": 3,
        "num_cached_tokens": 0,
        "num_output_tokens": 8,
        "num_preemptions": 0,
        "user": "alice",
        "priority": "batch",
        "finish_reasons": ["length"],
        "error": None,
    }
    line = records.lines[0]
    assert f"slow request {output.request_id}: {metrics.latency_s:.3f} s (queue " in line
    assert '3 prompt tokens (0 cached), 8 generated, user "alice", priority "batch", ' in line
    assert line.endswith("ended with length, preempted 0 times")


def test_every_value_is_documented(tiny, logger, records):
    slow = {"slow_request_s": 0.0}
    with small(tiny) as engine, log_stats(engine, interval_s=NEVER_S, logger=logger, **slow):
        engine.generate([[5, 6, 7]], SHORT)
    rows = [line.split("|")[1:3] for line in DOC.read_text().splitlines() if "` `" in line]
    for values in records.values:
        (row,) = [text for event, text in rows if event.strip() == f"`{values['event']}`"]
        named = {word for word in row.replace("`", " ").split() if "_" in word or word.isalpha()}
        assert set(values) - {"event"} <= named


def test_requests_that_are_fast_enough_have_none(tiny, logger, records):
    slow = {"slow_request_s": NEVER_S}
    with small(tiny) as engine, log_stats(engine, interval_s=NEVER_S, logger=logger, **slow):
        engine.generate([[5, 6, 7]], SHORT)
    assert [values["event"] for values in records.values] == ["stats"]


@pytest.mark.parametrize(
    "user",
    [
        "eve\n2026-01-01 ERROR root: forged",
        "eve\r\x1b[2K\x1b[1Aforged",
        "eve\u2028forged\x85\x0b\x0c",
        'eve", priority 0, ended with "stop',
        "\ud800 lone",
        "\\n",
    ],
)
def test_a_name_can_not_forge_a_line(tiny, logger, records, user):
    slow = {"slow_request_s": 0.0}
    with small(tiny) as engine, log_stats(engine, interval_s=NEVER_S, logger=logger, **slow):
        engine.generate([[5, 6, 7]], SHORT, user=user)
    line, values = records.lines[0], records.values[0]
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    assert line.count('"') == 2
    assert values["user"].isascii()
    assert values["user"].isprintable()
    assert values["user"].encode("ascii").decode("unicode_escape") == user  # nothing is lost


def test_failures_and_dropped_handles_are_told_as_they_are(tiny, logger, records):
    engine = small(tiny)
    logs = log_stats(engine, interval_s=NEVER_S, slow_request_s=0.0, logger=logger)
    engine.submit([5, 6, 7], LONG)  # dropped at once
    engine.pause()
    handle = engine.submit([5, 6, 7], LONG)
    engine.close()
    with pytest.raises(EngineClosedError):
        handle.result()
    logs.stop()
    slow = [values for values in records.values if values["event"] == "slow_request"]
    assert [values["finish_reasons"] for values in slow] == [["cancelled"], ["error"]]
    assert [values["error"] for values in slow] == [None, "EngineClosedError"]
    assert slow[0]["num_preemptions"] is None


def test_closing_the_engine_ends_the_thread(tiny, logger, records):
    with small(tiny) as engine:
        logs = log_stats(engine, interval_s=NEVER_S, logger=logger)
        engine.generate([[5, 6, 7]], SHORT)
    logs._thread.join(GIVE_UP_S)
    assert threads() == []
    assert len(records.all) == 1  # what there was to say is said
    logs.stop()
    logs.stop()


def test_an_engine_is_not_kept_alive(tiny, logger):
    engine = small(tiny)
    logs = log_stats(engine, interval_s=NEVER_S, slow_request_s=1.0, logger=logger)
    engine.generate([[5, 6, 7]], SHORT)
    native = engine._native
    del engine
    gc.collect()
    logs._thread.join(GIVE_UP_S)
    with pytest.raises(EngineClosedError):  # its __del__ has closed it
        native.has_room(b"", 1, 1)
    assert threads() == []


def test_logging_that_fails_harms_nobody(tiny, caplog):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("the disk is full")

    logger = logging.Logger("observed", logging.INFO)  # noqa: LOG001
    logger.addHandler(Broken())
    with small(tiny) as engine:
        with log_stats(engine, interval_s=NEVER_S, slow_request_s=0.0, logger=logger):
            (output,) = engine.generate([[5, 6, 7]], SHORT)
        assert output.finished
    assert caplog.text.count("RuntimeError: the disk is full") == 2
    assert threads() == []


def test_an_async_engine_may_be_given_before_it_is_loaded(tiny, logger, records):
    async def run():
        engine = bc.AsyncEngine(tiny, max_num_seqs=2, n_ctx=512, n_threads=1)
        with pytest.raises(EngineError, match="not loaded"):
            log_stats(engine, slow_request_s=1.0, logger=logger)
        with log_stats(engine, interval_s=NEVER_S, logger=logger):
            async with engine:
                with log_stats(engine, slow_request_s=0.0, logger=logger):
                    await engine.generate([5, 6, 7], SHORT)
                assert engine.engine._observers == ()

    asyncio.run(run())
    assert [values["event"] for values in records.values] == ["slow_request", "stats", "stats"]
    assert all(values["num_finished"]["length"] == 1 for values in records.values[1:])
    assert threads() == []


def test_the_default_logger_is_one_of_batchcore(tiny, caplog):
    caplog.set_level(logging.INFO, logger="batchcore.stats")
    with small(tiny) as engine, log_stats(engine, interval_s=NEVER_S):
        engine.generate([[5, 6, 7]], SHORT)
    assert [record.name for record in caplog.records if hasattr(record, "batchcore")] == [
        "batchcore.stats"
    ]


def test_histograms_of_an_interval():
    before, now = Histogram((1, 0, 2), 5.0), Histogram((1, 4, 2, 1), 9.0)
    assert _since(before, now) == Histogram((0, 4, 0, 1), 4.0)
    assert _since(None, now) is now


@pytest.mark.parametrize(
    "options",
    [
        {"interval_s": 0},
        {"interval_s": float("nan")},
        {"interval_s": float("inf")},
        {"slow_request_s": -1},
        {"slow_request_s": float("nan")},
    ],
)
def test_values_that_can_not_work_are_refused(tiny, options):
    with small(tiny) as engine, pytest.raises(ConfigError):
        log_stats(engine, **options)
    assert threads() == []


def test_a_stand_in_needs_stats_only():
    class Still:
        def stats(self):
            raise EngineError("not now")

    still = Still()
    log_stats(still, interval_s=NEVER_S).stop()
    with pytest.raises(ConfigError, match="observed"):
        log_stats(still, slow_request_s=1.0)
    assert threads() == []
