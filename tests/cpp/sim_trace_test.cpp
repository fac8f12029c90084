// The engine replayed on virtual time: what a simulation promises, and what it shows of the
// policies.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/fair_share.h"
#include "sim/sim_prompt.h"
#include "sim/simulated_engine.h"

namespace {

using namespace batchcore;

// Ten milliseconds a step, one per prompt token and row.
SimOptions options(std::int32_t max_num_seqs = 4) {
  SimOptions made;
  made.backend.num_slots = 2 * max_num_seqs;
  made.backend.num_cells = 4096;
  made.backend.cells_per_slot = 4096;
  made.backend.n_ubatch = 512;
  made.backend.max_outputs = 512;
  made.cost = {10e-3, 1e-3, 1e-3};
  made.engine.scheduler.max_num_seqs = max_num_seqs;
  made.engine.max_queued_requests = 1000;
  made.engine.max_queued_tokens = 1'000'000;
  made.engine.max_saved_bytes = std::size_t{1} << 30;
  made.engine.check_integrity = true;
  return made;
}

SimRequest request(double arrival_s, std::int32_t num_prompt, std::int32_t num_output,
                   std::int32_t key = 0) {
  SimRequest made;
  made.arrival_s = arrival_s;
  made.num_prompt_tokens = num_prompt;
  made.num_output_tokens = num_output;
  made.key = key;
  return made;
}

std::size_t common(const std::vector<Token>& a, const std::vector<Token>& b) {
  const auto size = static_cast<std::ptrdiff_t>(std::min(a.size(), b.size()));
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.begin() + size, b.begin()).first -
                                  a.begin());
}

SimEnd end_of(const SimOutcome& outcome) { return static_cast<SimEnd>(outcome.end); }
FinishReason reason_of(const SimOutcome& outcome) { return static_cast<FinishReason>(outcome.end); }

}  // namespace

TEST_CASE("sim: a request alone takes what its steps cost") {
  SimulatedEngine engine(options());
  CHECK(engine.submit(request(2.0, 20, 3)));
  CHECK(engine.load().num_requests == 1);
  CHECK(engine.load().num_tokens == 23);
  engine.run_all();
  const SimOutcome outcome = engine.outcomes().at(0);
  CHECK(outcome.arrival_s == 2.0);
  CHECK(outcome.admitted_s == 2.0);
  CHECK(outcome.first_token_s == doctest::Approx(2.030));
  CHECK(outcome.finished_s == doctest::Approx(2.030 + 2 * 0.011));
  CHECK(outcome.num_output_tokens == 3);
  CHECK(outcome.num_cached_tokens == 0);
  CHECK(reason_of(outcome) == FinishReason::kLength);
  CHECK(engine.load().num_requests == 0);
  CHECK(engine.load().num_tokens == 0);
}

TEST_CASE("sim: who comes while a step runs has waited since it came") {
  SimulatedEngine engine(options());
  engine.submit(request(0.0, 100, 1, 0));  // one step of 110 ms
  engine.submit(request(0.05, 10, 1, 1));
  engine.run_all();
  const SimOutcome second = engine.outcomes().at(1);
  CHECK(second.arrival_s == 0.05);
  CHECK(second.admitted_s == doctest::Approx(0.110));
  CHECK(second.first_token_s == doctest::Approx(0.130));
}

TEST_CASE("sim: run_until skips idle time and stops at the end of a step") {
  SimulatedEngine engine(options());
  engine.run_until(100.0);
  CHECK(engine.now() == 100.0);
  CHECK_THROWS_AS(engine.submit(request(99.0, 1, 1)), InvalidRequestError);
  engine.submit(request(100.0, 20, 10));
  engine.run_until(100.001);
  CHECK(engine.now() == doctest::Approx(100.030));
  CHECK(engine.load().num_requests == 1);
  engine.run_until(200.0);
  CHECK(engine.now() == 200.0);
  CHECK(engine.load().num_requests == 0);
  CHECK_THROWS_AS(engine.run_until(std::nan("")), InvalidRequestError);
  engine.submit(request(200.0, 20, 10, 1));
  CHECK_FALSE(engine.run_all(3));
  CHECK(engine.run_all());
  CHECK(engine.now() == engine.outcomes().back().finished_s);
}

TEST_CASE("sim: the queue's bound refuses, which is an outcome") {
  SimOptions small = options(1);
  small.engine.max_queued_requests = 1;
  SimulatedEngine engine(small);
  std::vector<SimRequest> all;
  for (std::int32_t i = 0; i < 4; ++i) all.push_back(request(0.001 * i, 50, 5, i));
  engine.replay(all);
  engine.run_all();
  const auto outcomes = engine.outcomes();
  REQUIRE(outcomes.size() == 4);
  CHECK(reason_of(outcomes[0]) == FinishReason::kLength);
  CHECK(reason_of(outcomes[1]) == FinishReason::kLength);
  for (const std::size_t i : {2, 3}) {
    CHECK(end_of(outcomes[i]) == SimEnd::kRefused);
    CHECK(outcomes[i].finished_s == outcomes[i].arrival_s);
    CHECK(std::isnan(outcomes[i].admitted_s));
    CHECK(outcomes[i].num_output_tokens == 0);
  }
  CHECK(engine.stats().num_refused == 2);
}

TEST_CASE("sim: timeouts in the queue and while running are kept") {
  SimulatedEngine engine(options(1));
  SimRequest first = request(0.0, 10, 1000, 0);
  first.timeout_s = 1.0;
  SimRequest second = request(0.05, 10, 1, 1);
  second.queue_timeout_s = 0.5;
  engine.submit(first);
  engine.submit(second);
  engine.run_all();
  const auto outcomes = engine.outcomes();
  CHECK(reason_of(outcomes[0]) == FinishReason::kTimeout);
  CHECK(outcomes[0].num_output_tokens > 50);
  CHECK(outcomes[0].finished_s == doctest::Approx(1.0).epsilon(0.02));
  CHECK(reason_of(outcomes[1]) == FinishReason::kTimeout);
  CHECK(std::isnan(outcomes[1].admitted_s));
  CHECK(outcomes[1].finished_s == doctest::Approx(0.55).epsilon(0.03));
}

TEST_CASE("sim: a batch that is held back goes on exactly when it has waited long enough") {
  SimOptions holds = options();
  holds.engine.scheduler.max_wait_s = 0.25;
  SimulatedEngine engine(holds);
  SimRequest impatient = request(5.1, 10, 1, 1);
  impatient.timeout_s = 0.1;
  engine.submit(request(5.0, 10, 1, 0));
  engine.submit(impatient);
  engine.run_all();
  const auto outcomes = engine.outcomes();
  CHECK(outcomes[0].admitted_s == 5.25);
  CHECK(reason_of(outcomes[1]) == FinishReason::kTimeout);
  CHECK(outcomes[1].finished_s == doctest::Approx(5.2));
}

TEST_CASE("sim: prompts share what their group shares, and nothing else") {
  std::vector<SimRequest> requests;
  for (std::int32_t i = 0; i < 60; ++i) {
    SimRequest made = request(0.0, 40 + i % 7, 1, i);
    made.prefix_group = i % 5 - 1;  // one in five has no group
    made.num_shared_tokens = 30;
    requests.push_back(made);
  }
  for (const SimRequest& a : requests) {
    const std::vector<Token> prompt = sim_prompt(a);
    CHECK(prompt == sim_prompt(a));
    for (const Token token : prompt) CHECK((token >= 0 && token < kSimVocabSize));
    for (const SimRequest& b : requests) {
      if (a.key == b.key) continue;
      const bool alike = a.prefix_group >= 0 && a.prefix_group == b.prefix_group;
      CHECK(common(prompt, sim_prompt(b)) == (alike ? 30 : 0));
    }
  }
  SimRequest largest = request(0.0, 3, 1, kMaxSimKeys - 1);
  CHECK_NOTHROW(check(largest));
  CHECK(sim_prompt(largest)[0] < kSimVocabSize);
  CHECK(sim_prompt(largest)[0] >= 0);
  largest.key += 1;
  CHECK_THROWS_AS(check(largest), InvalidRequestError);
}

TEST_CASE("sim: a group's prefix is computed once") {
  SimulatedEngine engine(options());
  for (std::int32_t i = 0; i < 10; ++i) {
    SimRequest made = request(i, 120, 2, i);
    made.prefix_group = 3;
    made.num_shared_tokens = 100;
    engine.submit(made);
  }
  engine.submit(request(10.0, 120, 2, 10));
  engine.run_all();
  const auto outcomes = engine.outcomes();
  CHECK(outcomes[0].num_cached_tokens == 0);
  for (std::size_t i = 1; i < 10; ++i) CHECK(outcomes[i].num_cached_tokens == 100);
  CHECK(outcomes[10].num_cached_tokens == 0);
  CHECK(engine.stats().num_cached_tokens == 900);
}

TEST_CASE("sim: what makes no request is refused as such, and leaves no outcome") {
  SimulatedEngine engine(options());
  const auto with = [](auto change) {
    SimRequest made = request(0.0, 10, 10);
    change(made);
    return made;
  };
  const std::vector<SimRequest> bad{
      with([](SimRequest& r) { r.num_prompt_tokens = 0; }),
      with([](SimRequest& r) { r.num_output_tokens = 0; }),
      with([](SimRequest& r) { r.arrival_s = -1.0; }),
      with([](SimRequest& r) { r.arrival_s = std::nan(""); }),
      with([](SimRequest& r) { r.timeout_s = 0.0; }),
      with([](SimRequest& r) { r.queue_timeout_s = std::nan(""); }),
      with([](SimRequest& r) { r.user = 1; }),
      with([](SimRequest& r) { r.user = -1; }),
      with([](SimRequest& r) { r.num_shared_tokens = 11; }),
      with([](SimRequest& r) { r.key = -1; }),
  };
  for (const SimRequest& made : bad) CHECK_THROWS_AS(engine.submit(made), InvalidRequestError);
  CHECK_THROWS_AS(engine.submit(request(0.0, 5000, 1)), PromptTooLongError);
  CHECK(engine.outcomes().empty());
  CHECK(engine.submit(request(0.0, 10, 1)));

  SimOptions timeless = options();
  timeless.cost = {0.0, 0.0, 1e-3};
  CHECK_THROWS_AS(SimulatedEngine{timeless}, ConfigError);
  timeless.cost = {1e-3, -1e-3, 1e-3};
  CHECK_THROWS_AS(SimulatedEngine{timeless}, ConfigError);
}

TEST_CASE("sim: under pressure every request ends, and its times are in order") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    SimOptions tight = options(8);
    tight.backend.layout = layout;
    tight.backend.num_slots = layout == KvLayout::kUnified ? 16 : 8;
    tight.backend.num_cells = 1024;
    tight.backend.cells_per_slot = layout == KvLayout::kUnified ? 1024 : 128;
    tight.cost.copied_token_s = 1e-5;
    SimulatedEngine engine(tight);
    std::mt19937 random(7);
    std::vector<SimRequest> all;
    double arrival = 0.0;
    for (std::int32_t i = 0; i < 2000; ++i) {
      arrival += 1e-3 * static_cast<double>(random() % 200);
      SimRequest made = request(arrival, 1 + static_cast<std::int32_t>(random() % 100),
                                1 + static_cast<std::int32_t>(random() % 60), i);
      made.priority = static_cast<std::int32_t>(random() % 3);
      made.prefix_group = static_cast<std::int32_t>(random() % 4) - 1;
      made.num_shared_tokens = made.num_prompt_tokens / 2;
      if (random() % 4 == 0) made.timeout_s = 0.5;
      all.push_back(made);
    }
    engine.replay(all);
    engine.run_all();
    const auto outcomes = engine.outcomes();
    REQUIRE(outcomes.size() == all.size());
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
      const SimOutcome& outcome = outcomes[i];
      CHECK(end_of(outcome) != SimEnd::kOpen);
      if (reason_of(outcome) != FinishReason::kLength) continue;
      CHECK(outcome.num_output_tokens ==
            std::min(all[i].num_output_tokens,
                     tight.backend.cells_per_slot + 1 - all[i].num_prompt_tokens));
      CHECK(outcome.arrival_s <= outcome.admitted_s);
      CHECK(outcome.admitted_s < outcome.first_token_s);
      CHECK(outcome.first_token_s <= outcome.finished_s);
    }
    CHECK(engine.load().num_tokens == 0);
  }
}

// Sheng et al. (OSDI'24), theorem 4.4: the service of two users who are backlogged all the while
// differs by at most 2 max(wp * longest prompt, wq * tokens of a batch), however long that goes on.
TEST_CASE("sim: the service of backlogged users stays within a bound that time does not enter") {
  for (const double weight : {1.0, 3.0}) {
    SimOptions shared = options(8);
    shared.users = {"anna", "bert"};
    shared.engine.max_queued_requests = 100'000;
    shared.engine.max_queued_tokens = 100'000'000;
    shared.engine.check_integrity = false;
    shared.engine.scheduler.queue.fair_share.user_weights = {{"anna", weight}};
    SimulatedEngine engine(shared);
    std::mt19937 random(3);
    std::int32_t key = 0;
    constexpr std::int32_t kLongestPrompt = 200;
    constexpr std::int32_t kLongestOutput = 100;
    // Both have enough waiting for all that follows, of other lengths and in other numbers.
    for (std::int32_t i = 0; i < 6000; ++i) {
      SimRequest made = request(0.0, 1 + static_cast<std::int32_t>(random() % 20),
                                1 + static_cast<std::int32_t>(random() % 10), key++);
      made.user = 0;
      if (i % 3 == 0) {
        made = request(0.0, kLongestPrompt - static_cast<std::int32_t>(random() % 50),
                       kLongestOutput - static_cast<std::int32_t>(random() % 50), key++);
        made.user = 1;
      } else {
        made.num_output_tokens += 40;
      }
      engine.submit(made);
    }
    const double bound =
        2.0 * std::max(1.0 * kLongestPrompt, 2.0 * 8 * (kLongestPrompt + kLongestOutput));
    double most = 0.0;
    double total = 0.0;
    for (int second = 1; second <= 600; ++second) {
      engine.run_until(second);
      std::vector<double> service;
      for (const double charged : engine.stats().service) {
        if (charged > 0.0) service.push_back(charged);
      }
      REQUIRE(service.size() == 2);
      std::sort(service.begin(), service.end());
      total = service[0] + service[1];
      // Who has more weight has got more, all the time.
      most = std::max(most, std::abs(service[1] / weight - service[0]));
    }
    CHECK(engine.load().num_requests > 100);  // both are still backlogged
    CHECK(most <= bound);
    CHECK(total > 5 * bound);  // so that the bound says something
  }
}
