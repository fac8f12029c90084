// Pausing, draining, batches that are held to fill, and a loop that sleeps meanwhile.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
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

FinishReason ending(RequestChannel& channel) {
  return collect(channel).completions.at(0).finish_reason.value();
}

RequestSpec endless(Token token, std::int32_t length) {
  RequestSpec spec = request({1, token}, length);
  spec.sampling.ignore_eos = true;
  return spec;
}

TEST_CASE("while paused nobody is admitted, and who runs goes on") {
  SimEngine sim;
  const auto running = sim.engine.submit(endless(2, 20));
  sim.engine.step();
  sim.engine.pause();
  const auto waits = sim.engine.submit(endless(3, 5));
  RequestSpec impatient = endless(4, 5);
  impatient.queue_timeout_s = 0.2;
  const auto expires = sim.engine.submit(impatient);
  for (int i = 0; i < 30; ++i) sim.engine.step();
  CHECK(ending(*running) == FinishReason::kLength);
  CHECK(ending(*expires) == FinishReason::kTimeout);
  CHECK_FALSE(waits->is_finished());
  CHECK(sim.engine.stats().is_paused);
  CHECK(sim.engine.stats().num_waiting == 1);
  sim.engine.abort(waits->id());
  const auto later = sim.engine.submit(endless(5, 5));
  sim.engine.step();
  CHECK(ending(*waits) == FinishReason::kCancelled);
  sim.engine.resume();
  REQUIRE(sim.run());
  CHECK(ending(*later) == FinishReason::kLength);
  CHECK_FALSE(sim.engine.stats().is_paused);
}

TEST_CASE("who had to give way comes back while paused") {
  SimOptions options;
  options.num_cells = 60;
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 3; ++i) channels.push_back(sim.engine.submit(endless(2 + i, 30)));
  sim.engine.step();
  CHECK(sim.engine.stats().num_running > 1);
  const auto running = sim.engine.stats().num_running;
  sim.engine.pause();
  for (int i = 0; i < 500; ++i) sim.engine.step();
  CHECK(sim.engine.stats().num_preemptions > 0);
  std::int32_t done = 0;
  for (const auto& channel : channels) done += channel->is_finished() ? 1 : 0;
  CHECK(done == running);
  sim.engine.resume();
  REQUIRE(sim.run());
}

TEST_CASE("draining refuses what is new and ends what is there") {
  SimEngine sim;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 8; ++i) channels.push_back(sim.engine.submit(endless(2 + i, 10)));
  sim.engine.drain();
  CHECK(sim.engine.stats().is_draining);
  CHECK_THROWS_AS((void)sim.engine.submit(endless(1, 1)), EngineClosedError);
  REQUIRE(sim.run());
  for (const auto& channel : channels) CHECK(ending(*channel) == FinishReason::kLength);
  CHECK_THROWS_AS((void)sim.engine.submit(endless(1, 1)), EngineClosedError);
  sim.engine.resume();
  CHECK_NOTHROW((void)sim.engine.submit(endless(1, 1)));
}

TEST_CASE("an idle engine holds a batch until it is full or the oldest has waited enough") {
  SimOptions options;
  options.adjust = [](EngineConfig& config) { config.scheduler.max_wait_s = 0.5; };
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  channels.push_back(sim.engine.submit(endless(2, 20)));
  sim.engine.step();
  sim.skipped = 0.4;
  channels.push_back(sim.engine.submit(endless(3, 20)));
  sim.engine.step();
  CHECK(sim.engine.stats().num_running == 0);
  sim.skipped = 0.5;
  sim.engine.step();
  CHECK(sim.engine.stats().num_running == 2);
  channels.push_back(sim.engine.submit(endless(4, 20)));
  sim.engine.step();
  CHECK(sim.engine.stats().num_running == 3);  // only an idle engine waits
  REQUIRE(sim.run());
  for (int i = 0; i < 4; ++i) channels.push_back(sim.engine.submit(endless(10 + i, 5)));
  sim.engine.step();
  CHECK(sim.engine.stats().num_running == 4);
  REQUIRE(sim.run());
  for (const auto& channel : channels) CHECK(ending(*channel) == FinishReason::kLength);
}

// The loop asks for the time at every turn: how often it does tells whether it sleeps.
struct Threaded {
  explicit Threaded(const SimOptions& options)
      : engine(std::make_unique<SimBackend>(testing::sim_info(options), options.cost),
               testing::small_vocab(), testing::sim_config(options), [this] {
                 num_looks += 1;
                 return steady_seconds();
               }) {
    engine.start();
  }
  std::atomic<int> num_looks{0};
  Engine engine;
};

TEST_CASE("a paused loop sleeps until the next deadline, and wakes for it") {
  Threaded threaded({});
  threaded.engine.pause();
  RequestSpec soon = endless(2, 5);
  soon.timeout_s = 0.15;
  const auto first = threaded.engine.submit(soon);
  RequestSpec in_queue = endless(3, 5);
  in_queue.queue_timeout_s = 0.25;
  const auto second = threaded.engine.submit(in_queue);
  const auto third = threaded.engine.submit(endless(4, 5));
  REQUIRE(first->wait(20.0));
  REQUIRE(second->wait(20.0));
  const testing::Result late = collect(*second);
  CHECK(late.completions.at(0).finish_reason == FinishReason::kTimeout);
  CHECK(late.metrics.finished_s - late.metrics.arrival_s >= 0.25);
  CHECK(threaded.num_looks < 300);
  CHECK_FALSE(third->is_finished());
  threaded.engine.resume();
  REQUIRE(third->wait(20.0));
  CHECK(ending(*third) == FinishReason::kLength);
}

TEST_CASE("a loop that holds a batch sleeps, and wakes when it is due or full") {
  SimOptions options;
  options.adjust = [](EngineConfig& config) { config.scheduler.max_wait_s = 0.2; };
  Threaded threaded(options);
  const auto alone = threaded.engine.submit(endless(2, 3));
  REQUIRE(alone->wait(20.0));
  const testing::Result result = collect(*alone);
  CHECK(result.metrics.admitted_s - result.metrics.arrival_s >= 0.2);
  CHECK(threaded.num_looks < 300);
  std::vector<RequestSpec> four;
  for (int i = 0; i < 4; ++i) four.push_back(endless(10 + i, 3));
  for (const auto& channel : threaded.engine.submit_all(std::move(four), false)) {
    REQUIRE(channel->wait(20.0));
    CHECK(ending(*channel) == FinishReason::kLength);
  }
}

TEST_CASE("an engine that is paused, resumed and drained by many threads loses nobody") {
  Threaded threaded({});
  std::atomic<int> ended{0};
  std::atomic<int> refused{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 25; ++i) {
        RequestSpec spec = endless(2 + t, 8);
        spec.user = "user" + std::to_string(i % 3);
        try {
          const auto channel = threaded.engine.submit(std::move(spec));
          while (!channel->is_finished()) (void)channel->wait(1.0);
          ended += 1;
        } catch (const EngineClosedError&) {
          refused += 1;
        }
      }
    });
  }
  std::atomic<bool> done{false};
  std::thread control([&] {
    while (!done) {
      threaded.engine.pause();
      (void)threaded.engine.stats();
      threaded.engine.drain();
      threaded.engine.resume();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (std::thread& thread : threads) thread.join();
  done = true;
  control.join();
  CHECK(ended + refused == 100);
  CHECK_FALSE(threaded.engine.has_work());
}

TEST_CASE("closing wakes a paused engine") {
  Threaded threaded({});
  threaded.engine.pause();
  const auto channel = threaded.engine.submit(endless(2, 5));
  threaded.engine.close();
  REQUIRE(channel->is_finished());
  CHECK(ending(*channel) == FinishReason::kError);
}

TEST_CASE("latencies are counted once per request, and per token") {
  SimEngine sim;
  for (int i = 0; i < 6; ++i) (void)sim.engine.submit(endless(2 + i, 10));
  const auto cancelled = sim.engine.submit(endless(50, 10));
  sim.engine.step();
  sim.engine.abort(cancelled->id());
  REQUIRE(sim.run());
  const Latencies latencies = sim.engine.stats().latencies;
  CHECK(latencies.queue.count() == 6);
  CHECK(latencies.ttft.count() == 6);
  CHECK(latencies.itl.count() == 6 * 9);
  CHECK(latencies.e2e.count() == 6);
  // Four rows take 22 ms, two take 16.
  CHECK(latencies.itl.quantile(0.5) == doctest::Approx(0.022).epsilon(0.07));
  CHECK(latencies.queue.quantile(1.0) > 0.15);
}

TEST_CASE("tiers are counted best first") {
  SimOptions options;
  options.max_num_seqs = 2;
  SimEngine sim(options);
  for (const int priority : {7, 3, 3, 5}) {
    RequestSpec spec = endless(2, 20);
    spec.priority = priority;
    (void)sim.engine.submit(std::move(spec));
  }
  sim.engine.step();
  const EngineStats stats = sim.engine.stats();
  REQUIRE(stats.num_tiers == 3);
  CHECK(stats.tiers[0].priority == 3);
  CHECK(stats.tiers[0].num_running == 2);
  CHECK(stats.tiers[0].num_waiting == 0);
  CHECK(stats.tiers[1].priority == 5);
  CHECK(stats.tiers[1].num_waiting == 1);
  CHECK(stats.tiers[2].priority == 7);
  CHECK(stats.tiers[2].num_waiting == 1);
}

}  // namespace
}  // namespace batchcore
