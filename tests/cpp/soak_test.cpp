// Ten thousand requests of several users and tiers, three in ten of them cancelled at random
// moments, and twenty thousand that are four times too many: nothing is lost, and the account is
// proven after every step.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::FaultyBackend;
using testing::request;
using testing::SimEngine;
using testing::SimOptions;

void soak(KvLayout layout, MemoryKind memory, bool with_failures, std::int32_t row_group = 4) {
  constexpr int kRequests = 10'000;
  std::mt19937 random(11);
  SimOptions options;
  options.layout = layout;
  options.memory = memory;
  options.row_group = row_group;
  options.num_slots = 16;
  options.max_num_seqs = 12;
  options.num_cells = layout == KvLayout::kUnified ? 300 : 16 * 96;
  options.cells_per_slot = 96;
  options.max_queued_requests = kRequests;
  options.host_cache_bytes = 8192;
  options.cost.loose_row_s = 0.002;
  options.adjust = [](EngineConfig& config) {
    config.scheduler.queue.aging_s = 1.0;
    config.scheduler.queue.fair_share.max_idle_users = 20;
    config.scheduler.tier_limits = {{0, 0, 2}, {2, 8, 0}};
  };
  auto owned = std::make_unique<FaultyBackend>(testing::sim_info(options), options.cost);
  if (with_failures) {
    owned->leaves_a_part = true;
    owned->fault = [&random](const MicroBatch&) {
      // Rare enough that hardly a request meets two in a row.
      return random() % 500 == 0 ? DecodeStatus::kAllocFailed : DecodeStatus::kOk;
    };
  }
  FaultyBackend& backend = *owned;
  SimEngine sim(std::move(owned), options);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  std::vector<RequestId> to_cancel;
  for (int i = 0; i < kRequests; ++i) {
    std::vector<Token> prompt(1 + random() % 60, static_cast<Token>(1 + random() % 8));
    for (std::size_t k = prompt.size() / 2; k < prompt.size(); ++k) {
      prompt[k] = static_cast<Token>(1 + random() % 63);
    }
    RequestSpec spec = request(std::move(prompt), 1 + static_cast<int>(random() % 40));
    if (random() % 10 == 0) spec.sampling.n = 2;
    spec.priority = static_cast<int>(random() % 3);
    spec.user = std::to_string(random() % 100);
    if (random() % 50 == 0) spec.queue_timeout_s = 0.2;
    channels.push_back(sim.engine.submit(std::move(spec)));
    if (random() % 10 < 3) to_cancel.push_back(channels.back()->id());
    while (random() % 4 != 0 && sim.engine.has_work()) {
      sim.engine.step();
      if (!to_cancel.empty() && random() % 2 == 0) {
        sim.engine.abort(to_cancel.back());
        to_cancel.pop_back();
      }
    }
  }
  for (const RequestId id : to_cancel) sim.engine.abort(id);
  REQUIRE(sim.run(1'000'000));
  std::map<FinishReason, int> ends;
  for (const auto& channel : channels) {
    REQUIRE(channel->is_finished());
    for (const CompletionDelta& completion : collect(*channel).completions) {
      REQUIRE(completion.finish_reason);
      ends[*completion.finish_reason] += completion.index == 0 ? 1 : 0;
    }
  }
  int all = 0;
  for (const auto& [reason, count] : ends) all += count;
  CHECK(all == kRequests);
  CHECK(ends[FinishReason::kCancelled] > 500);
  CHECK(ends[FinishReason::kLength] + ends[FinishReason::kStop] > 6000);
  CHECK(ends[FinishReason::kError] <= (with_failures ? 20 : 0));
  CHECK(backend.num_refused == 0);
  CHECK(sim.engine.stats().num_active_cells == 0);
  CHECK(sim.engine.stats().saved_bytes == 0);
  CHECK(sim.engine.stats().num_running + sim.engine.stats().num_waiting == 0);
  CHECK(sim.engine.stats().num_active_users == 0);
}

TEST_CASE("overload: 20,000 requests at four times what the engine can do") {
  constexpr int kRequests = 20'000;
  std::mt19937 random(17);
  SimOptions options;
  options.num_slots = 16;
  options.max_num_seqs = 12;
  options.num_cells = 1200;
  options.cells_per_slot = 200;
  options.max_queued_requests = 400;
  options.cost = {5e-3, 0.2e-3, 0.5e-3, 0.0, 0.0};
  options.adjust = [](EngineConfig& config) {
    config.shed = true;
    config.max_queued_requests_per_user = 100;
    config.max_queued_tokens_per_user = 4000;
    config.scheduler.queue.aging_s = 2.0;
    config.scheduler.tier_limits = {{0, 0, 2}, {2, 8, 0}};
    config.scheduler.adaptive = true;
    config.scheduler.target_itl_s = 0.03;
  };
  SimEngine sim(options);
  // About 12 rows in 11 ms and 20 tokens per request: 54 requests per second, of which 216 come.
  std::exponential_distribution<double> gap(216.0);
  double arrival = 0.0;
  std::vector<std::pair<RequestSpec, std::shared_ptr<RequestChannel>>> taken;
  std::int64_t refused = 0;
  const auto now = [&sim] { return sim.backend->now() + sim.skipped; };
  for (int i = 0; i < kRequests; ++i) {
    arrival += gap(random);
    while (now() < arrival && sim.engine.has_work()) sim.engine.step();
    if (now() < arrival) sim.skipped += arrival - now();
    RequestSpec spec =
        request(std::vector<Token>(1 + random() % 40), 1 + static_cast<int>(random() % 40));
    for (Token& token : spec.prompt) token = static_cast<Token>(1 + random() % 63);
    spec.priority = static_cast<int>(random() % 3);
    spec.user = random() % 2 == 0 ? "flood" : std::to_string(random() % 30);
    if (random() % 4 == 0) spec.timeout_s = 3.0;
    if (random() % 4 == 0) spec.queue_timeout_s = 1.0;
    if (random() % 20 == 0) spec.sampling.n = 2;
    try {
      auto channel = sim.engine.submit(spec);
      taken.emplace_back(std::move(spec), std::move(channel));
    } catch (const QueueFullError& error) {
      refused += 1;
      REQUIRE(error.retry_after_s > 0.0);
      REQUIRE(error.retry_after_s <= 300.0);
    }
    if (random() % 20 == 0 && !taken.empty()) {
      sim.engine.abort(taken[taken.size() - 1 - random() % std::min<std::size_t>(taken.size(), 50)]
                           .second->id());
    }
  }
  REQUIRE(sim.run());
  std::map<FinishReason, std::int64_t> ends;
  double wait_of_flood = 0.0;
  double wait_of_others = 0.0;
  for (const auto& [spec, channel] : taken) {
    REQUIRE(channel->is_finished());
    const testing::Result result = collect(*channel);
    REQUIRE(result.completions.size() == static_cast<std::size_t>(spec.sampling.n));
    REQUIRE(result.completions[0].finish_reason);
    REQUIRE(result.metrics.num_preemptions <= 8);
    ends[*result.completions[0].finish_reason] += 1;
    if (result.metrics.admitted_s == 0.0) continue;
    double& worst = spec.user == "flood" ? wait_of_flood : wait_of_others;
    worst = std::max(worst, result.metrics.admitted_s - result.metrics.arrival_s);
  }
  const EngineStats stats = sim.engine.stats();
  CHECK(refused + static_cast<std::int64_t>(taken.size()) == kRequests);
  CHECK(refused == stats.num_refused);
  std::int64_t all = 0;
  for (std::size_t i = 0; i < stats.num_finished.size(); ++i) all += stats.num_finished[i];
  CHECK(all == static_cast<std::int64_t>(taken.size()));
  CHECK(ends[FinishReason::kError] == 0);
  CHECK(ends[FinishReason::kLength] + ends[FinishReason::kStop] > 4000);
  CHECK(ends[FinishReason::kTimeout] > 0);
  CHECK(ends[FinishReason::kCancelled] > 0);
  CHECK(stats.num_shed > 1000);
  CHECK(refused > 10'000);
  CHECK(wait_of_others < wait_of_flood / 3);
  CHECK(stats.num_running + stats.num_waiting + stats.num_active_users == 0);
  CHECK(stats.num_active_cells == 0);
  CHECK(stats.num_slot_preemptions > 0);
}

TEST_CASE("soak: 10,000 requests, unified") {
  soak(KvLayout::kUnified, MemoryKind::kAttention, false);
}
TEST_CASE("soak: 10,000 requests, streams") {
  soak(KvLayout::kStreams, MemoryKind::kAttention, false);
}
TEST_CASE("soak: 10,000 requests, unified, without row groups") {
  soak(KvLayout::kUnified, MemoryKind::kAttention, false, 1);
}
TEST_CASE("soak: 10,000 requests, recurrent, with failures") {
  soak(KvLayout::kUnified, MemoryKind::kRecurrent, true);
}
TEST_CASE("soak: 10,000 requests, streams, with failures") {
  soak(KvLayout::kStreams, MemoryKind::kAttention, true);
}

}  // namespace
}  // namespace batchcore
