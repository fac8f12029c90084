// Who is refused at submit, and with which hint; deadlines in the queue.
#include "engine/queue_load.h"

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/errors.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::request;
using testing::SimEngine;
using testing::SimOptions;
using Tokens = std::vector<Token>;

RequestSpec waiting(const std::string& user, std::size_t num_tokens, std::int32_t priority = 0) {
  RequestSpec spec = request(Tokens(num_tokens, 5), 10);
  spec.user = user;
  spec.priority = priority;
  return spec;
}

RequestSpec urgent(const std::string& user, std::size_t num_tokens, double timeout_s) {
  RequestSpec spec = waiting(user, num_tokens);
  spec.timeout_s = timeout_s;
  return spec;
}

// Ten requests of a hundred tokens per second.
QueueRate steady_rate() {
  QueueRate rate;
  for (int i = 0; i < 100; ++i) rate.observe(0.1, 1, 100);
  return rate;
}

void ask(QueueLoad& load, const RequestSpec& spec) {
  const RequestSpec* one = &spec;
  load.require_room(std::span(&one, 1));
}

// What the refusal says, or -1 where there is none.
double retry_after(QueueLoad& load, const RequestSpec& spec) {
  try {
    ask(load, spec);
  } catch (const QueueFullError& error) {
    return error.retry_after_s;
  }
  return -1.0;
}

TEST_CASE("the rate is that of the last seconds, and unknown until enough was seen") {
  QueueRate rate;
  CHECK_FALSE(rate.is_known());
  for (int i = 0; i < 3; ++i) rate.observe(1.0, 1, 50);
  CHECK_FALSE(rate.is_known());
  rate.observe(1.0, 1, 50);
  REQUIRE(rate.is_known());
  CHECK(rate.requests_per_s() == doctest::Approx(1.0));
  CHECK(rate.tokens_per_s() == doctest::Approx(50.0));
  for (int i = 0; i < 100; ++i) rate.observe(1.0, 4, 100);
  CHECK(rate.requests_per_s() == doctest::Approx(4.0).epsilon(0.01));
  rate.observe(0.0, 100, 100);
  CHECK(rate.requests_per_s() == doctest::Approx(4.0).epsilon(0.01));
}

TEST_CASE("a full queue says when to come back") {
  QueueLoad load({5, 1000, 0, 0, false});
  for (int i = 0; i < 5; ++i) load.add(waiting("a", 100));
  CHECK(retry_after(load, waiting("b", 10)) == 1.0);  // nothing is known yet
  load.set_rate(steady_rate());
  CHECK(retry_after(load, waiting("b", 10)) == doctest::Approx(0.1).epsilon(0.01));
  load.remove(waiting("a", 100));
  CHECK(retry_after(load, waiting("b", 10)) == -1.0);
  CHECK(retry_after(load, waiting("b", 800)) == doctest::Approx(0.2).epsilon(0.01));
  CHECK(load.num_refused() == 3);
  QueueRate slow;
  for (int i = 0; i < 10; ++i) slow.observe(1e6, 1, 1);
  load.set_rate(slow);
  CHECK(retry_after(load, waiting("b", 800)) == 300.0);
}

TEST_CASE("a user has bounds of its own, others have room") {
  QueueLoad load({100, 100'000, 3, 500, false});
  for (int i = 0; i < 3; ++i) load.add(waiting("a", 100));
  load.add(waiting("c", 10));
  load.set_rate(steady_rate());
  try {
    ask(load, waiting("a", 1));
    FAIL("taken");
  } catch (const QueueFullError& error) {
    CHECK(error.capacity == 3);
    CHECK(error.retry_after_s == doctest::Approx(0.2).epsilon(0.01));  // two users take turns
  }
  CHECK(retry_after(load, waiting("b", 1)) == -1.0);
  CHECK(retry_after(load, waiting("b", 9000)) == -1.0);  // one is always taken
  load.remove(waiting("a", 100));
  CHECK(retry_after(load, waiting("a", 300)) == -1.0);
  try {
    ask(load, waiting("a", 301));
    FAIL("taken");
  } catch (const QueueFullError& error) {
    CHECK(error.capacity == 500);
  }
}

TEST_CASE("what is ahead are better tiers, and in its own what its user and fairness put there") {
  QueueLoad load({1000, 1'000'000, 0, 0, true});
  load.add(waiting("x", 70, -1));
  load.add(waiting("x", 9000, 1));
  for (int i = 0; i < 10; ++i) load.add(waiting("flood", 100));
  load.add(urgent("flood", 30, 5.0));
  CHECK(load.tokens_ahead(waiting("quiet", 50)) == 70);
  load.add(urgent("quiet", 40, 5.0));
  CHECK(load.tokens_ahead(urgent("quiet", 50, 5.0)) == 70 + 40 + 40);
  CHECK(load.tokens_ahead(urgent("flood", 50, 5.0)) == 70 + 30 + 30);  // no deadline comes later
  CHECK(load.tokens_ahead(waiting("x", 1, 2)) == 70 + 9000 + 10 * 100 + 30 + 40);
}

TEST_CASE("who would wait longer than its timeout is refused at once") {
  QueueLoad load({1000, 1'000'000, 0, 0, true});
  for (int i = 0; i < 20; ++i) load.add(urgent("a", 100, 60.0));
  CHECK(retry_after(load, urgent("a", 10, 0.5)) == -1.0);  // no rate is known
  load.set_rate(steady_rate());                            // 2000 tokens take two seconds
  CHECK(retry_after(load, urgent("a", 10, 0.5)) == doctest::Approx(1.5).epsilon(0.01));
  CHECK(retry_after(load, urgent("a", 10, 2.5)) == -1.0);
  CHECK(retry_after(load, urgent("b", 10, 0.5)) == -1.0);  // it is b's turn before
  CHECK(retry_after(load, waiting("a", 10)) == -1.0);      // has time
  RequestSpec in_queue = waiting("a", 10);
  in_queue.queue_timeout_s = 1.0;
  CHECK(retry_after(load, in_queue) == doctest::Approx(1.0).epsilon(0.01));
  CHECK(load.num_shed() == 2);
  const RequestSpec first = urgent("b", 900, 1.0);
  const RequestSpec second = urgent("b", 200, 1.0);
  const RequestSpec third = urgent("b", 10, 1.0);
  const std::vector<const RequestSpec*> all{&first, &second, &third};
  CHECK_THROWS_AS(load.require_room(all), QueueFullError);  // the third would wait 1.1 s
  CHECK_NOTHROW(load.require_room(std::span(all).first(2)));
  QueueLoad patient({1000, 1'000'000, 0, 0, false});
  for (int i = 0; i < 20; ++i) patient.add(urgent("a", 100, 60.0));
  patient.set_rate(steady_rate());
  CHECK(retry_after(patient, urgent("a", 10, 0.5)) == -1.0);
}

TEST_CASE("a queue timeout ends who was never admitted, and nobody else") {
  SimOptions options;
  options.max_num_seqs = 1;
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 3; ++i) {
    RequestSpec spec = request({1, static_cast<Token>(2 + i)}, 50);
    spec.sampling.ignore_eos = true;
    spec.queue_timeout_s = i == 2 ? 10.0 : 0.1;
    channels.push_back(sim.engine.submit(std::move(spec)));
  }
  REQUIRE(sim.run());
  CHECK(collect(*channels[0]).completions.at(0).finish_reason == FinishReason::kLength);
  const testing::Result late = collect(*channels[1]);
  CHECK(late.completions.at(0).finish_reason == FinishReason::kTimeout);
  CHECK(late.metrics.finished_s - late.metrics.arrival_s == doctest::Approx(0.1).epsilon(0.2));
  CHECK(late.metrics.admitted_s == 0.0);
  CHECK(collect(*channels[2]).completions.at(0).finish_reason == FinishReason::kLength);
}

TEST_CASE("a queue timeout does not end who was preempted") {
  SimOptions options;
  options.max_num_seqs = 1;
  SimEngine sim(options);
  RequestSpec low = request({1, 2}, 20);
  low.sampling.ignore_eos = true;
  low.priority = 1;
  low.queue_timeout_s = 0.1;
  const auto first = sim.engine.submit(low);
  sim.engine.step();
  const auto second = sim.engine.submit(request({3, 4}, 30));
  REQUIRE(sim.run());
  const testing::Result result = collect(*first);
  CHECK(result.metrics.num_preemptions == 1);
  CHECK(result.completions.at(0).finish_reason == FinishReason::kLength);
}

TEST_CASE("the engine sheds by what it has measured, and tells how long it would take") {
  SimOptions options;
  options.max_num_seqs = 2;
  options.num_cells = 1024;
  options.prefix_caching = false;
  options.adjust = [](EngineConfig& config) {
    config.shed = true;
    config.max_queued_requests_per_user = 100;
  };
  SimEngine sim(options);
  const auto spec = [](double timeout_s) {
    RequestSpec made = request(Tokens(20, 5), 10);
    made.sampling.ignore_eos = true;
    made.user = std::string("a");
    made.timeout_s = timeout_s;
    return made;
  };
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 100; ++i) channels.push_back(sim.engine.submit(spec(1e6)));
  try {
    (void)sim.engine.submit(spec(1e6));
    FAIL("taken");
  } catch (const QueueFullError& error) {
    CHECK(error.capacity == 100);
    CHECK(error.retry_after_s == 1.0);
  }
  for (int i = 0; i < 250; ++i) sim.engine.step();
  const auto waits = sim.engine.stats().num_waiting;
  REQUIRE(waits > 20);
  const auto last = sim.engine.submit(spec(1e6));
  double predicted = 0.0;
  try {
    (void)sim.engine.submit(spec(0.5));
    FAIL("taken");
  } catch (const QueueFullError& error) {
    predicted = error.retry_after_s + 0.5;
  }
  CHECK(sim.engine.stats().num_shed == 1);
  CHECK(sim.engine.stats().num_refused == 2);
  RequestSpec other = spec(0.5);
  other.user = std::string("b");
  CHECK_NOTHROW((void)sim.engine.submit(other));
  REQUIRE(sim.run());
  const RequestMetrics metrics = collect(*last).metrics;
  CHECK(metrics.admitted_s - metrics.arrival_s == doctest::Approx(predicted).epsilon(0.25));
}

TEST_CASE("an idle engine sheds nobody") {
  SimOptions options;
  options.adjust = [](EngineConfig& config) { config.shed = true; };
  SimEngine sim(options);
  for (int i = 0; i < 50; ++i) {
    RequestSpec spec = request({1, 2, 3}, 4);
    spec.queue_timeout_s = 0.0;
    CHECK_NOTHROW((void)sim.engine.submit(std::move(spec)));
    REQUIRE(sim.run());
  }
}

TEST_CASE("weights that mean nothing and timeouts that are no numbers are refused") {
  SimOptions options;
  options.adjust = [](EngineConfig& config) {
    config.scheduler.queue.fair_share.user_weights = {{"a", 0.0}};
  };
  CHECK_THROWS_AS(SimEngine{options}, ConfigError);
  SimEngine sim;
  RequestSpec spec = request({1}, 1);
  spec.queue_timeout_s = std::nan("");
  CHECK_THROWS_AS((void)sim.engine.submit(spec), InvalidRequestError);
}

}  // namespace
}  // namespace batchcore
