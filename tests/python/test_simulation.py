"""The engine on virtual time: traces, results, and what they show of fairness."""

import math

import numpy as np
import pytest
from batchcore import SchedulingPolicy, Tier
from batchcore.bench.metrics import Slo
from batchcore.errors import ConfigError, InvalidRequestError, PromptTooLongError
from batchcore.routing.policies import ReplicaLoad
from batchcore.simulation import (
    SimDevice,
    SimRequest,
    SimulatedEngine,
    Trace,
    jain_index,
    prompt_token_ids,
    simulate,
)

# Ten milliseconds a call, one per prompt token and per row.
DEVICE = SimDevice(base_s=10e-3, prefill_token_s=1e-3, decode_row_s=1e-3)


def trace_of(*arrivals, num_prompt_tokens=20, num_output_tokens=3, **columns):
    return Trace.of(
        arrival_s=arrivals,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        **columns,
    )


class TestTrace:
    def test_single_values_are_for_all_requests(self):
        trace = trace_of(0.0, 1.0, 1.0, num_output_tokens=[1, 2, 3], priority=2)
        assert len(trace) == 3
        assert trace.duration_s == 1.0
        assert trace.priority.tolist() == [2, 2, 2]
        assert trace.num_output_tokens.tolist() == [1, 2, 3]
        assert trace.requests["key"].tolist() == [0, 1, 2]
        assert np.isinf(trace.requests["timeout_s"]).all()
        assert trace.prefix_group.tolist() == [-1, -1, -1]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"arrival_s": [1.0, 0.0]}, "ascend"),
            ({"arrival_s": [-1.0]}, "at least 0"),
            ({"arrival_s": [math.nan]}, "at least 0"),
            ({"arrival_s": [0.0], "num_prompt_tokens": 0}, "num_prompt_tokens must be at least 1"),
            ({"arrival_s": [0.0], "num_output_tokens": -3}, "num_output_tokens"),
            ({"arrival_s": [0.0], "timeout_s": 0.0}, "timeout_s must be above 0"),
            ({"arrival_s": [0.0], "queue_timeout_s": math.nan}, "queue_timeout_s"),
            ({"arrival_s": [0.0], "user": 1}, "no name"),
            ({"arrival_s": [0.0], "num_shared_tokens": 99}, "num_shared_tokens"),
            ({"arrival_s": [0.0], "colour": 1}, "unknown column 'colour'"),
            ({"arrival_s": [0.0], "priority": [1, 2]}, "priority of a trace"),
            ({"arrival_s": [0.0], "users": ("x" * 300,)}, "user"),
        ],
    )
    def test_what_can_not_work_is_refused(self, columns, message):
        values = {"num_prompt_tokens": 10, "num_output_tokens": 10} | columns
        with pytest.raises(ConfigError, match=message):
            Trace.of(**values)

    def test_lengths_must_be_given(self):
        with pytest.raises(ConfigError, match="a trace needs num_output_tokens"):
            Trace.of(arrival_s=[0.0], num_prompt_tokens=1)

    def test_poisson_has_its_rate_and_seed(self):
        trace = Trace.poisson(50.0, 100.0, prompt_tokens="uniform:5:9", user="anna", seed=4)
        assert len(trace) == pytest.approx(5000, rel=0.1)
        assert trace.duration_s < 100.0
        assert set(trace.num_prompt_tokens.tolist()) == {5, 6, 7, 8, 9}
        assert trace.users == ("anna",)
        again = Trace.poisson(50.0, 100.0, prompt_tokens="uniform:5:9", user="anna", seed=4)
        assert (trace.requests == again.requests).all()
        other = Trace.poisson(50.0, 100.0, prompt_tokens="uniform:5:9", user="anna", seed=5)
        assert not np.array_equal(trace.arrival_s, other.arrival_s)

    def test_a_day_is_busiest_at_noon(self):
        trace = Trace.day(20.0, 300.0, swing=0.9, seed=1)
        counts, _ = np.histogram(trace.arrival_s, [0, 100, 200, 300])
        assert len(trace) == pytest.approx(6000, rel=0.1)
        assert counts[1] > 1.5 * max(counts[0], counts[2])
        with pytest.raises(ConfigError, match="swing"):
            Trace.day(20.0, 300.0, swing=2.0)

    def test_a_rate_above_its_peak_is_refused(self):
        with pytest.raises(ConfigError, match="peak"):
            Trace.varying(lambda times: 2 * np.ones_like(times), 1.0, 100.0)

    def test_flooding_has_one_busy_user(self):
        trace = Trace.flooding(40.0, 2.0, 50.0, num_others=3)
        assert trace.users == ("flood", "user-1", "user-2", "user-3")
        counts = np.bincount(trace.user)
        assert counts[0] > 10 * counts[1:].max()
        assert (np.diff(trace.arrival_s) >= 0).all()
        assert len(set(trace.requests["key"].tolist())) == len(trace)
        assert trace.of_one_user().users == ("everybody",)
        assert (trace.of_one_user().arrival_s == trace.arrival_s).all()

    def test_merged_traces_keep_their_users(self):
        merged = Trace.merged(
            trace_of(0.0, 2.0, users=("a",)), trace_of(1.0, users=("b", "a"), user=1)
        )
        assert merged.users == ("a", "b")
        assert merged.arrival_s.tolist() == [0.0, 1.0, 2.0]
        assert [merged.users[user] for user in merged.user] == ["a", "a", "a"]

    def test_prefix_groups_come_in_front_of_prompts(self):
        trace = Trace.poisson(100.0, 20.0, prompt_tokens=7).with_prefix_groups(5, 30, skew=1.0)
        assert (trace.num_prompt_tokens == 37).all()
        counts = np.bincount(trace.prefix_group, minlength=5)
        assert (counts > 0).all()
        assert counts[0] == counts.max()

    def test_speed_changes_arrivals_only(self):
        trace = trace_of(0.0, 1.0, 3.0)
        assert trace.at_speed(2.0).arrival_s.tolist() == [0.0, 0.5, 1.5]
        with pytest.raises(ConfigError):
            trace.at_speed(0.0)


class TestDevice:
    @pytest.mark.parametrize(
        "values",
        [
            {"base_s": -1.0, "prefill_token_s": 0.0, "decode_row_s": 0.0},
            {"base_s": 0.0, "prefill_token_s": 0.0, "decode_row_s": 1.0},
            {"base_s": math.nan, "prefill_token_s": 0.0, "decode_row_s": 0.0},
        ],
    )
    def test_what_takes_no_time_is_refused(self, values):
        with pytest.raises(ConfigError):
            SimDevice(**values)

    def test_an_engine_learns_the_device_that_it_runs_on(self):
        device = SimDevice(
            base_s=5e-3, prefill_token_s=0.1e-3, decode_row_s=0.5e-3, kv_token_s=1e-6
        )
        lengths = {"prompt_tokens": "uniform:50:400", "output_tokens": "uniform:5:90"}
        trace = Trace.poisson(10.0, 120.0, **lengths)
        stats = simulate(trace, device, max_num_seqs=16, n_ctx=16_384).stats
        fitted = SimDevice.fitted(stats)
        for prefill, rows, kv in ((0, 8, 2000), (256, 8, 10_000), (0, 1, 300)):
            work = {"prefill_tokens": prefill, "decode_rows": rows, "kv_tokens": kv}
            assert fitted.call_s(**work) == pytest.approx(device.call_s(**work), rel=0.1)

    def test_nothing_is_fitted_to_an_idle_engine(self):
        with pytest.raises(ConfigError, match="not run enough"):
            SimDevice.fitted(SimulatedEngine(DEVICE).stats())


class TestSimulate:
    def test_a_request_alone_takes_what_its_calls_cost(self):
        result = simulate(trace_of(2.0), DEVICE)
        assert result.is_simulated
        assert result.ttft_s.tolist() == pytest.approx([0.030])
        assert result.latency_s.tolist() == pytest.approx([0.030 + 2 * 0.011])
        assert result.tpot_s.tolist() == pytest.approx([0.011])
        assert result.queue_s.tolist() == [0.0]
        assert result.is_completed.tolist() == [True]
        assert result.total_s == pytest.approx(2.052)
        assert result.stats.num_generated_tokens == 3

    def test_the_same_trace_gives_the_same_times(self):
        trace = Trace.poisson(30.0, 30.0, prompt_tokens="loguniform:5:400", output_tokens=20)
        options = {"max_num_seqs": 8, "n_ctx": 2048, "check_integrity": True}
        one = simulate(trace, DEVICE, **options)
        two = simulate(trace, DEVICE, sample_interval_s=0.7, **options)
        assert (one.outcomes == two.outcomes).all()
        assert one.is_completed.all()
        assert one.samples == ()
        assert [sample.time_s for sample in two.samples] == pytest.approx(
            [0.7 * (number + 1) for number in range(len(two.samples))]
        )
        assert two.samples[-1].stats.num_generated_tokens == 20 * len(trace)
        assert max(sample.stats.num_running for sample in two.samples) == 8

    def test_what_is_refused_or_late_is_an_outcome(self):
        trace = trace_of(*(0.0,) * 6, num_prompt_tokens=50, num_output_tokens=100, timeout_s=1.5)
        result = simulate(trace, DEVICE, max_num_seqs=1, max_queued_requests=3)
        assert result.is_refused.sum() == 3
        assert result.is_completed.sum() == 1
        assert result.is_timed_out.sum() == 2
        assert np.isnan(result.ttft_s[result.is_refused]).all()
        assert result.summary()["ends"] == {"length": 1, "timeout": 2, "refused": 3}
        assert result.goodput(Slo(e2el_ms=1e4)) == 0.0  # all came at once: no time to count over

    def test_a_prompt_that_never_fits_raises(self):
        with pytest.raises(PromptTooLongError):
            simulate(trace_of(0.0, num_prompt_tokens=300), DEVICE, n_ctx=256)

    def test_prefixes_of_a_group_are_computed_once(self):
        trace = trace_of(0.0, 1.0, 2.0, num_prompt_tokens=120, prefix_group=[4, 4, 5],
                         num_shared_tokens=100)  # fmt: skip
        assert simulate(trace, DEVICE).num_cached_tokens.tolist() == [0, 100, 0]
        without = simulate(trace, DEVICE, prefix_caching=False)
        assert without.num_cached_tokens.tolist() == [0, 0, 0]

    def test_streams_divide_the_cells(self):
        engine = SimulatedEngine(DEVICE, kv_layout="streams", max_num_seqs=4, n_ctx=400)
        with pytest.raises(PromptTooLongError):
            engine.submit(SimRequest(arrival_s=0.0, num_prompt_tokens=101, num_output_tokens=1))

    @pytest.mark.parametrize(
        "options",
        [
            {"max_num_seqs": 0},
            {"max_num_seqs": 1000},
            {"n_ctx": -1},
            {"kv_layout": "rings"},
            {"target_itl_ms": 0.0},
            {"prefill_policy": "sometimes"},
            {"max_wait_ms": -1.0},
            {"n_threads": 2},
            {"kv_layout": "streams", "n_ctx": 8, "max_num_seqs": 16},
        ],
    )
    def test_options_are_checked_as_an_engine_does(self, options):
        with pytest.raises(ConfigError):
            simulate(trace_of(0.0), DEVICE, **options)

    def test_max_wait_holds_a_batch_back(self):
        result = simulate(trace_of(1.0, 1.1), DEVICE, max_wait_ms=200.0)
        assert result.admitted_s.tolist() == [1.2, 1.2]

    def test_the_best_tier_goes_first(self):
        policy = SchedulingPolicy(tiers=(Tier("fast", -1), Tier("slow", 1)))
        priority = np.where(np.arange(200) % 4 == 0, -1, 1)
        trace = trace_of(*np.linspace(0, 2, 200), priority=priority, num_output_tokens=20)
        result = simulate(trace, DEVICE, max_num_seqs=4, policy=policy)
        fast = result.percentile(result.ttft_s, 95, priority == -1)
        slow = result.percentile(result.ttft_s, 95, priority == 1)
        assert fast < slow / 2
        slo = Slo(ttft_ms=1e3 * fast)
        assert result.goodput(slo, priority == -1) > result.goodput(slo, priority == 1)
        with pytest.raises(ConfigError, match="tpot"):
            result.is_good(Slo(itl_ms=10))


class TestSteppedEngine:
    def test_it_is_driven_by_hand(self):
        engine = SimulatedEngine(DEVICE, max_num_seqs=2)
        engine.run_until(5.0)
        assert engine.now_s == 5.0
        assert engine.load() == ReplicaLoad(0, 0)
        request = SimRequest(
            arrival_s=5.0, num_prompt_tokens=20, num_output_tokens=10, user="anna", key=1
        )
        assert engine.submit(request)
        assert engine.load() == ReplicaLoad(30, 1)
        engine.run_until(5.001)
        assert engine.now_s == pytest.approx(5.030)
        engine.run_all()
        assert engine.load() == ReplicaLoad(0, 0)
        with pytest.raises(InvalidRequestError, match="before"):
            engine.submit(request)
        result = engine.result()
        assert result.trace.users == ("anna",)
        assert result.trace.arrival_s.tolist() == [5.0]
        assert result.of_user("anna").tolist() == [True]
        with pytest.raises(ConfigError):
            result.of_user("bert")

    def test_an_engine_without_requests_has_an_empty_result(self):
        result = SimulatedEngine(DEVICE).result()
        assert len(result.trace) == 0
        assert result.total_s == 0.0
        assert math.isnan(result.percentile(result.ttft_s, 95))

    def test_traces_follow_each_other(self):
        engine = SimulatedEngine(DEVICE)
        engine.replay(trace_of(0.0, users=("anna",)))
        engine.submit(SimRequest(arrival_s=1.0, num_prompt_tokens=5, num_output_tokens=1, key=7))
        result = engine.replay(trace_of(2.0, 3.0, users=("bert", "anna"), user=[0, 1]))
        assert result.trace.users == ("anna", "", "bert")
        assert result.trace.user.tolist() == [0, 1, 2, 0]
        assert result.is_completed.all()

    def test_a_trace_that_fails_half_way_leaves_what_was_submitted(self):
        engine = SimulatedEngine(DEVICE, n_ctx=100)
        with pytest.raises(PromptTooLongError):
            engine.replay(trace_of(0.0, 1.0, 2.0, num_prompt_tokens=[10, 200, 10]))
        engine.run_all()
        assert engine.result().trace.arrival_s.tolist() == [0.0]

    def test_tokens_of_prompts_are_those_that_the_engine_sees(self):
        def request(key, group=-1):
            return SimRequest(
                arrival_s=0.0, num_prompt_tokens=12, num_output_tokens=1, key=key,
                prefix_group=group, num_shared_tokens=8,
            )  # fmt: skip

        one, two = prompt_token_ids(request(1, 3)), prompt_token_ids(request(2, 3))
        assert one[:8] == two[:8]
        assert one[8] != two[8]
        assert prompt_token_ids(request(1))[0] != prompt_token_ids(request(2))[0]
        assert one == prompt_token_ids(request(1, 3))
        with pytest.raises(InvalidRequestError):
            prompt_token_ids(request(-1))
        with pytest.raises(InvalidRequestError):
            prompt_token_ids(request(2**40))


def test_jain_index():
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert math.isnan(jain_index([]))


def test_service_adds_up_to_what_was_computed():
    trace = Trace.flooding(20.0, 3.0, 20.0, prompt_tokens="uniform:10:60", output_tokens=15)
    result = simulate(trace, DEVICE, max_num_seqs=8)
    times = np.linspace(0.0, result.total_s, 50)
    service = result.service(times)
    assert (np.diff(service, axis=1) >= -1e-6).all()
    expected = trace.num_prompt_tokens - result.num_cached_tokens + 2 * result.num_output_tokens
    for user in range(len(trace.users)):
        assert service[user, 0] == 0.0
        assert service[user, -1] == pytest.approx(expected[trace.user == user].sum())


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_gap_between_backlogged_users_has_a_bound_without_time(weight):
    """Theorem 4.4 of Sheng et al., OSDI'24: 2 max(wp * longest prompt, wq * tokens of a batch)."""
    trace = Trace.merged(
        Trace.poisson(30.0, 150.0, user="anna", prompt_tokens="uniform:10:60", output_tokens=40),
        Trace.poisson(6.0, 150.0, user="bert", prompt_tokens="uniform:200:300", output_tokens=90),
    )
    policy = SchedulingPolicy(user_weights={"anna": weight}, aging_s=None)
    result = simulate(trace, DEVICE, max_num_seqs=8, policy=policy)
    times = np.arange(10.0, 150.0)
    service = result.service(times) / np.array([[weight], [1.0]])
    gap = np.abs(service[0] - service[1])
    bound = 2 * max(1.0 * 300, 2.0 * 8 * (300 + 90))
    assert gap.max() <= bound
    assert service.sum(axis=0)[-1] > 3 * bound  # so that it says something
    assert result.jain_index(10.0, 150.0, weights={"anna": weight}) > 0.99
    # First come, first served has no such bound: the gap grows all the time.
    unfair = simulate(trace.of_one_user(), DEVICE, max_num_seqs=8)
    given = type(unfair)(trace, DEVICE, unfair.outcomes, unfair.stats).service(times)
    drift = np.abs(given[0] - given[1])
    assert drift[-1] > 3 * gap.max()
    assert drift[-1] > drift[len(drift) // 2]
