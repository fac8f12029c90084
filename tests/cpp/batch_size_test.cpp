#include "core/batch_size.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::request;
using testing::SimEngine;
using testing::SimOptions;

TEST_CASE("the knee is the smallest batch with 95% of the throughput") {
  const std::array<double, 4> cost{10e-3, 1e-3, 1e-3, 0.0};
  const auto throughput = [](double n) { return n / (10e-3 + 1e-3 * n); };
  CHECK(throughput_knee(cost, 0.0, 64) == 47);
  CHECK(throughput(47) >= 0.95 * throughput(64));
  CHECK(throughput(46) < 0.95 * throughput(64));
  // With a row's keys and values to read, more rows pay less.
  CHECK(throughput_knee({10e-3, 1e-3, 1e-3, 1e-6}, 9000.0, 64) == 15);
  CHECK(throughput_knee({10e-3, 0, 0, 0}, 0.0, 64) == 61);  // rows cost nothing: nearly all
  CHECK(throughput_knee({0, 1e-3, 1e-3, 0}, 0.0, 64) == 64);
  CHECK(throughput_knee({1e-9, 1e-3, 1e-3, 0}, 0.0, 64) == 1);
}

// One window in which `running` sequences see latencies of `itl_s`, 4% of them `slow_s`.
void window(BatchSizeController& controller, std::int32_t running, double itl_s, double slow_s) {
  for (std::size_t i = 0; i < BatchSizeController::kWindow; ++i) {
    controller.observe(i % 25 == 0 ? slow_s : itl_s, running);
  }
}

TEST_CASE("latency above the target shrinks the batch by a quarter, far below it grows by one") {
  BatchSizeController controller(64, 0.050);
  std::vector<std::int32_t> limits;
  for (int i = 0; i < 6; ++i) {
    const double itl = 0.010 + 0.002 * controller.limit();
    window(controller, controller.limit(), itl, itl);
    limits.push_back(controller.limit());
  }
  CHECK(limits == std::vector<std::int32_t>{48, 36, 27, 20, 20, 20});  // 20 take 50 ms
  window(controller, 20, 0.060, 0.060);
  CHECK(controller.limit() == 15);
  limits.clear();
  for (int i = 0; i < 4; ++i) {
    const double itl = 0.010 + 0.002 * controller.limit();
    window(controller, controller.limit(), itl, itl);
    limits.push_back(controller.limit());
  }
  CHECK(limits == std::vector<std::int32_t>{16, 17, 17, 17});  // 17 take 44 ms: in the band
  CHECK(controller.num_decreases() == 5);
  CHECK(controller.num_increases() == 2);
}

TEST_CASE("one token in twenty-five may be late") {
  BatchSizeController controller(16, 0.050);
  window(controller, 16, 0.045, 0.500);
  CHECK(controller.limit() == 16);
}

TEST_CASE("only what was seen under the limit counts") {
  BatchSizeController controller(16, 0.050);
  window(controller, 16, 0.080, 0.080);
  CHECK(controller.limit() == 12);
  for (int i = 0; i < 5; ++i) window(controller, 16, 0.080, 0.080);  // they are still running
  CHECK(controller.limit() == 12);
  window(controller, 5, 0.010, 0.010);  // nobody needs more
  CHECK(controller.limit() == 12);
  window(controller, 8, 0.080, 0.080);  // fewer than might run were too many
  CHECK(controller.limit() == 6);
  for (int i = 0; i < 20; ++i) window(controller, controller.limit(), 0.080, 0.080);
  CHECK(controller.limit() == 1);
  controller.set_knee(4);
  for (int i = 0; i < 30; ++i) window(controller, controller.limit(), 0.010, 0.010);
  CHECK(controller.limit() == 4);
}

TEST_CASE("without a target nothing but the knee bounds the batch") {
  BatchSizeController controller(16, 0.0);
  window(controller, 16, 9.0, 9.0);
  CHECK(controller.limit() == 16);
  controller.set_knee(7);
  CHECK(controller.limit() == 7);
}

struct Loaded {
  double p95_itl = 0.0;
  double tokens_per_s = 0.0;
  EngineStats stats;
};

// 32 slots that are always wanted; measured after a quarter of the requests.
Loaded saturate(bool adaptive, double target_itl_s, const SimCost& cost) {
  SimOptions options;
  options.num_slots = 32;
  options.max_num_seqs = 32;
  options.num_cells = 8192;
  options.n_ubatch = 64;
  options.prefix_caching = false;
  options.cost = cost;
  options.max_queued_requests = 10'000;
  options.adjust = [&](EngineConfig& config) {
    config.scheduler.adaptive = adaptive;
    config.scheduler.target_itl_s = target_itl_s;
    config.check_integrity = false;
  };
  SimEngine sim(options);
  for (int i = 0; i < 1600; ++i) {
    RequestSpec spec = request(std::vector<Token>(static_cast<std::size_t>(4 + i % 9), 5), 40);
    spec.sampling.ignore_eos = true;
    (void)sim.engine.submit(std::move(spec));
  }
  while (sim.engine.stats().num_finished[1] < 400) sim.engine.step();
  const EngineStats before = sim.engine.stats();
  const double start = sim.backend->now();
  while (sim.engine.stats().num_finished[1] < 1500) sim.engine.step();
  Loaded loaded;
  loaded.stats = sim.engine.stats();
  loaded.tokens_per_s =
      static_cast<double>(loaded.stats.num_generated_tokens - before.num_generated_tokens) /
      (sim.backend->now() - start);
  LogHistogram histogram;
  for (std::size_t b = 0; b < LogHistogram::kNumBuckets; ++b) {
    const auto count = loaded.stats.latencies.itl.count_in(b) - before.latencies.itl.count_in(b);
    for (std::int64_t i = 0; i < count; ++i) histogram.record(LogHistogram::lower_bound(b));
  }
  loaded.p95_itl = histogram.quantile(0.95);
  return loaded;
}

TEST_CASE("under load the target is met, which a fixed batch misses") {
  const SimCost cost{10e-3, 0.5e-3, 3e-3, 0.0, 0.0};
  const Loaded fixed = saturate(false, 0.060, cost);
  const Loaded adaptive = saturate(true, 0.060, cost);
  CHECK(fixed.p95_itl > 0.100);
  CHECK(adaptive.p95_itl <= 0.060 * 1.07);  // a bucket's width
  CHECK(adaptive.stats.batch_size_limit >= 10);
  CHECK(adaptive.stats.batch_size_limit <= 16);
  CHECK(adaptive.stats.num_batch_size_decreases > 0);
  CHECK(fixed.stats.batch_size_limit == 32);
}

TEST_CASE("beyond the knee there is hardly any throughput, and no sequence") {
  const SimCost cost{20e-3, 0.5e-3, 10e-3, 0.0, 0.0};
  const Loaded fixed = saturate(false, 0.0, cost);
  const Loaded adaptive = saturate(true, 0.0, cost);
  // 0.95 * 32 * 20 / (20 + 0.05 * 32 * 10) = 16.9
  CHECK(adaptive.stats.batch_size_limit >= 15);
  CHECK(adaptive.stats.batch_size_limit <= 19);
  CHECK(adaptive.tokens_per_s > 0.93 * fixed.tokens_per_s);
  CHECK(adaptive.p95_itl < 0.65 * fixed.p95_itl);
}

}  // namespace
}  // namespace batchcore
