// Ten thousand requests, three in ten of them cancelled at random moments: nothing is lost, and the
// account is proven after every step.
#include <doctest/doctest.h>

#include <map>
#include <random>
#include <vector>

#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::FaultyBackend;
using testing::request;
using testing::SimEngine;
using testing::SimOptions;

void soak(KvLayout layout, MemoryKind memory, bool with_failures) {
  constexpr int kRequests = 10'000;
  std::mt19937 random(11);
  SimOptions options;
  options.layout = layout;
  options.memory = memory;
  options.num_slots = 16;
  options.max_num_seqs = 12;
  options.num_cells = layout == KvLayout::kUnified ? 300 : 16 * 96;
  options.cells_per_slot = 96;
  options.max_queued_requests = kRequests;
  options.host_cache_bytes = 8192;
  options.cost.loose_row_s = 0.002;
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
}

TEST_CASE("soak: 10,000 requests, unified") {
  soak(KvLayout::kUnified, MemoryKind::kAttention, false);
}
TEST_CASE("soak: 10,000 requests, streams") {
  soak(KvLayout::kStreams, MemoryKind::kAttention, false);
}
TEST_CASE("soak: 10,000 requests, recurrent, with failures") {
  soak(KvLayout::kUnified, MemoryKind::kRecurrent, true);
}
TEST_CASE("soak: 10,000 requests, streams, with failures") {
  soak(KvLayout::kStreams, MemoryKind::kAttention, true);
}

}  // namespace
}  // namespace batchcore
