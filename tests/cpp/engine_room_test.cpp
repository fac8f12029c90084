// Waiting for room in the queue, for an idle engine, and what ends such waiting.
#include <doctest/doctest.h>
#include <poll.h>

#include <atomic>
#include <thread>
#include <vector>

#include "core/errors.h"
#include "engine/notifier.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::request;
using testing::SimEngine;
using testing::SimOptions;
using Tokens = std::vector<Token>;

RequestSpec endless(std::int32_t length, const std::string& user = "") {
  RequestSpec spec = request({1, 2, 3}, length);
  spec.sampling.ignore_eos = true;
  spec.user = user;
  return spec;
}

SimOptions two_may_wait() {
  SimOptions options;
  options.max_num_seqs = 1;
  options.max_queued_requests = 2;
  return options;
}

TEST_CASE("room is what submit would accept, of requests, tokens and for a user") {
  SimOptions options = two_may_wait();
  options.adjust = [](EngineConfig& config) {
    config.max_queued_tokens = 10;
    config.max_queued_requests_per_user = 1;
  };
  SimEngine sim(options);
  CHECK(sim.engine.has_room({"", 1, 1000}));  // the first is taken however long it is
  CHECK_FALSE(sim.engine.has_room({"", 2, 1000}));
  const auto channel = sim.engine.submit(endless(3, "a"));
  CHECK_FALSE(sim.engine.has_room({"a", 1, 1}));
  CHECK(sim.engine.has_room({"b", 1, 7}));
  CHECK_FALSE(sim.engine.has_room({"b", 1, 8}));
  sim.engine.step();
  CHECK(sim.engine.has_room({"a", 1, 10}));
  CHECK(sim.engine.stats().num_refused == 0);  // asking is no attempt
  REQUIRE(sim.run());
}

TEST_CASE("who waits for room goes on when a request leaves the queue") {
  SimEngine sim(two_may_wait());
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 2; ++i) channels.push_back(sim.engine.submit(endless(3)));
  CHECK_FALSE(sim.engine.wait_for_room({}, 0.0));
  std::atomic<bool> found = false;
  std::thread waiter([&] { found = sim.engine.wait_for_room({}, 60.0); });
  REQUIRE(sim.run());
  waiter.join();
  CHECK(found);
}

TEST_CASE("a watcher is told once, and one that is registered twice is one") {
  SimEngine sim(two_may_wait());
  const auto notifier = std::make_shared<Notifier>();
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 2; ++i) channels.push_back(sim.engine.submit(endless(3)));
  sim.engine.watch_room(notifier);
  sim.engine.watch_room(notifier);
  sim.engine.step();
  pollfd readable{notifier->fd(), POLLIN, 0};
  CHECK(poll(&readable, 1, 0) == 1);
  CHECK(notifier->take() == std::vector<RequestId>{Engine::kRoomNews});
  REQUIRE(sim.run());
  CHECK(notifier->take().empty());
}

TEST_CASE("draining and closing end the waiting for room") {
  for (const bool drains : {true, false}) {
    SimEngine sim(two_may_wait());
    std::vector<std::shared_ptr<RequestChannel>> channels;
    for (int i = 0; i < 2; ++i) channels.push_back(sim.engine.submit(endless(3)));
    const auto notifier = std::make_shared<Notifier>();
    sim.engine.watch_room(notifier);
    std::atomic<bool> refused = false;
    std::thread waiter([&] {
      try {
        (void)sim.engine.wait_for_room({}, 60.0);
      } catch (const EngineClosedError&) {
        refused = true;
      }
    });
    drains ? sim.engine.drain() : sim.engine.close();
    waiter.join();
    CHECK(refused);
    CHECK(notifier->take().size() == 1);
    CHECK_THROWS_AS((void)sim.engine.has_room({}), EngineClosedError);
    REQUIRE(sim.run());
  }
}

TEST_CASE("who waits for an idle engine goes on when the last request ends") {
  SimEngine sim;
  CHECK(sim.engine.wait_until_idle(0.0));
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 6; ++i) channels.push_back(sim.engine.submit(endless(5)));
  CHECK_FALSE(sim.engine.wait_until_idle(0.0));
  std::atomic<bool> idle = false;
  std::thread waiter([&] { idle = sim.engine.wait_until_idle(60.0); });
  REQUIRE(sim.run());
  waiter.join();
  CHECK(idle);
}

// A machine that was suspended, or a debugger: hours may lie between two readings.
TEST_CASE("a clock that jumps ahead ends what is too late, and nothing else") {
  SimOptions options;
  options.max_num_seqs = 2;
  options.adjust = [](EngineConfig& config) { config.scheduler.queue.aging_s = 1.0; };
  SimEngine sim(options);
  RequestSpec impatient = endless(20);
  impatient.timeout_s = 60.0;
  RequestSpec waits = endless(5);
  waits.queue_timeout_s = 60.0;
  const auto running = sim.engine.submit(endless(20));
  const auto late = sim.engine.submit(impatient);
  sim.engine.step();
  const auto late_in_queue = sim.engine.submit(waits);
  const auto patient = sim.engine.submit(endless(5));
  for (int i = 0; i < 3; ++i) sim.engine.step();
  sim.skipped += 1e6;
  REQUIRE(sim.run());
  const auto ending = [](RequestChannel& channel) {
    return testing::collect(channel).completions.at(0).finish_reason.value();
  };
  CHECK(ending(*running) == FinishReason::kLength);
  CHECK(ending(*late) == FinishReason::kTimeout);
  CHECK(ending(*late_in_queue) == FinishReason::kTimeout);
  CHECK(ending(*patient) == FinishReason::kLength);
}

}  // namespace
}  // namespace batchcore
