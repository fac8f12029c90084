// What the engine does with KV memory beyond the running sequences: pins, the host tier, dummy
// rows, and decode calls that are cut short.
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

RequestSpec pinned(Tokens prompt) {
  RequestSpec spec = request(std::move(prompt), 1);
  spec.pins = true;
  return spec;
}

Tokens joined(Tokens first, const Tokens& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

TEST_CASE("a pinned prefix outlives others and serves until it is let go") {
  SimOptions options;
  options.num_cells = 120;
  SimEngine sim(options);
  const Tokens system(40, 7);
  const auto pin = sim.engine.submit(pinned(system));
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_pinned == 1);
  for (int i = 0; i < 20; ++i) (void)sim.engine.submit(request(Tokens(50, 10 + i), 8));
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_evictions > 5);
  const auto asks = sim.engine.submit(request(joined(system, {1, 2}), 2));
  REQUIRE(sim.run());
  CHECK(collect(*asks).metrics.num_cached_tokens == 40);
  sim.engine.unpin(pin->id());
  for (int i = 0; i < 20; ++i) (void)sim.engine.submit(request(Tokens(50, 10 + i), 8));
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_pinned == 0);
  const auto again = sim.engine.submit(request(joined(system, {1, 2}), 2));
  REQUIRE(sim.run());
  CHECK(collect(*again).metrics.num_cached_tokens < 40);
}

TEST_CASE("a recurrent memory shares a pinned prefix as a whole") {
  SimOptions options;
  options.memory = MemoryKind::kRecurrent;
  options.num_cells = 400;
  SimEngine sim(options);
  (void)sim.engine.submit(pinned(Tokens(40, 7)));
  REQUIRE(sim.run());
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 6; ++i) {
    channels.push_back(sim.engine.submit(request(joined(Tokens(40, 7), {i + 1}), 4)));
  }
  REQUIRE(sim.run());
  for (const auto& channel : channels) CHECK(collect(*channel).metrics.num_cached_tokens == 40);
}

TEST_CASE("pins are bounded, and one that is cancelled or pushed out counts no more") {
  SimOptions options;
  options.num_cells = 64;
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> pins;
  for (int i = 0; i < 4; ++i) pins.push_back(sim.engine.submit(pinned(Tokens(4, 7 + i))));
  CHECK_THROWS_AS((void)sim.engine.submit(pinned({1})), InvalidRequestError);
  sim.engine.abort(pins[0]->id());
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_pinned == 3);
  const auto fourth = sim.engine.submit(pinned({1, 2, 3, 4}));
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_pinned == 4);
  // Needs all cells: the pins give way, and nothing fails.
  const auto longest = sim.engine.submit(request(Tokens(60, 50), 4));
  REQUIRE(sim.run());
  CHECK(collect(*longest).completions.at(0).token_ids.size() > 0);
  CHECK(sim.engine.stats().num_pinned == 0);
  for (int i = 0; i < 4; ++i) (void)sim.engine.submit(pinned(Tokens(4, 7 + i)));
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_pinned == 4);
}

TEST_CASE("a pin needs a prefix cache and a single completion") {
  SimOptions options;
  options.prefix_caching = false;
  CHECK_THROWS_AS((void)SimEngine(options).engine.submit(pinned({1})), InvalidRequestError);
  RequestSpec two = pinned({1});
  two.sampling.n = 2;
  CHECK_THROWS_AS((void)SimEngine().engine.submit(two), InvalidRequestError);
}

TEST_CASE("an evicted prefix comes back from host memory, with the same outputs") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    for (const MemoryKind memory : {MemoryKind::kAttention, MemoryKind::kRecurrent}) {
      SimOptions options;
      options.layout = layout;
      options.memory = memory;
      options.num_cells = layout == KvLayout::kUnified ? 300 : 8 * 300;
      options.host_cache_bytes = 1 << 16;
      SimEngine sim(options);
      const Tokens prefix(200, 7);
      const auto pin = sim.engine.submit(pinned(prefix));  // for the exact state
      REQUIRE(sim.run());
      sim.engine.unpin(pin->id());
      const auto flood = [&sim] {
        for (int i = 0; i < 16; ++i) (void)sim.engine.submit(request(Tokens(150, 20 + i), 8));
        REQUIRE(sim.run());
      };
      flood();
      CHECK(sim.engine.stats().host_cache_bytes > 0);
      const auto asks = sim.engine.submit(request(joined(prefix, {1, 2, 3}), 10));
      REQUIRE(sim.run());
      const testing::Result result = collect(*asks);
      CHECK(result.metrics.num_cached_tokens == 200);
      CHECK(sim.engine.stats().num_host_tokens >= 200);
      SimEngine fresh(options);
      const auto alone = fresh.engine.submit(request(joined(prefix, {1, 2, 3}), 10));
      REQUIRE(fresh.run());
      CHECK(result.completions[0].token_ids == collect(*alone).completions[0].token_ids);
    }
  }
}

TEST_CASE("host memory stays within its bound and keeps what was used last") {
  HostCache cache;
  cache.set_max_bytes(100);
  const auto put = [&cache](Token token, std::size_t length, std::size_t bytes) {
    cache.put({Tokens(length, token), std::vector<std::uint8_t>(bytes)}, false);
  };
  put(1, 10, 40);
  put(2, 10, 40);
  cache.touch(cache.longest_match(Tokens(10, 1), false).entry);
  put(3, 10, 40);
  CHECK(cache.num_bytes() == 80);
  CHECK(cache.longest_match(Tokens(10, 1), false).length == 10);
  CHECK(cache.longest_match(Tokens(10, 2), false).entry == nullptr);
  put(1, 20, 50);  // replaces what it goes on from
  CHECK(cache.size() == 2);
  put(9, 10, 101);
  CHECK(cache.size() == 2);
  CHECK(cache.longest_match(Tokens(5, 1), true).entry == nullptr);
  CHECK(cache.longest_match(Tokens(5, 1), false).length == 5);
}

TEST_CASE("dummy rows change no output and leave no trace") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    for (const MemoryKind memory : {MemoryKind::kAttention, MemoryKind::kRecurrent}) {
      SimOptions options;
      options.layout = layout;
      options.memory = memory;
      options.num_cells = layout == KvLayout::kUnified ? 512 : 8 * 64;
      options.max_num_seqs = 7;
      options.cost.loose_row_s = 0.01;
      options.prefix_caching = memory == MemoryKind::kAttention;  // leaves free slots to the other
      SimEngine grouped(options);
      options.cost.loose_row_s = 0.0;
      SimEngine plain(options);
      options.row_group = 1;
      options.cost.loose_row_s = 0.01;
      SimEngine ungrouped(options);
      std::vector<std::shared_ptr<RequestChannel>> unfilled;
      std::vector<std::shared_ptr<RequestChannel>> ours;
      std::vector<std::shared_ptr<RequestChannel>> theirs;
      for (int i = 0; i < 60; ++i) {
        RequestSpec spec = request(Tokens(static_cast<std::size_t>(3 + i % 20), 1 + i), 5 + i % 31);
        spec.sampling.ignore_eos = true;
        ours.push_back(grouped.engine.submit(spec));
        theirs.push_back(plain.engine.submit(spec));
        unfilled.push_back(ungrouped.engine.submit(spec));
      }
      REQUIRE(grouped.run());
      REQUIRE(plain.run());
      REQUIRE(ungrouped.run());
      CAPTURE(static_cast<int>(layout));
      CAPTURE(static_cast<int>(memory));
      CHECK(grouped.engine.stats().num_filler_rows > 0);
      // Without row groups only gaps between streams get dummy rows.
      CHECK(ungrouped.engine.stats().num_extra_outputs == 0);
      if (layout == KvLayout::kUnified) CHECK(ungrouped.engine.stats().num_filler_rows == 0);
      for (std::size_t i = 0; i < ours.size(); ++i) {
        const Tokens expected = collect(*theirs[i]).completions[0].token_ids;
        CHECK(collect(*ours[i]).completions[0].token_ids == expected);
        CHECK(collect(*unfilled[i]).completions[0].token_ids == expected);
      }
    }
  }
}

// Computes until it is told to stop.
struct SlowBackend : SimBackend {
  using SimBackend::SimBackend;
  DecodeStatus decode(const MicroBatch& batch) override {
    is_computing = true;
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (is_slow && !told_to_stop && std::chrono::steady_clock::now() < give_up) {
      std::this_thread::yield();
    }
    is_computing = false;
    if (told_to_stop.exchange(false)) return DecodeStatus::kInterrupted;
    return SimBackend::decode(batch);
  }
  void interrupt() override { told_to_stop = true; }
  std::atomic<bool> is_slow{true};
  std::atomic<bool> is_computing{false};
  std::atomic<bool> told_to_stop{false};
};

TEST_CASE("a decode call ends early once all that it computes is cancelled, and not before") {
  auto owned = std::make_unique<SlowBackend>(testing::sim_info({}), SimCost{});
  SlowBackend& backend = *owned;
  Engine engine(std::move(owned), testing::small_vocab(), testing::sim_config({}));
  const auto first = engine.submit(request({1, 2, 3}, 5));
  const auto second = engine.submit(request({4, 5, 6}, 5));
  engine.start();
  while (!backend.is_computing) std::this_thread::yield();
  engine.abort(first->id());
  engine.abort(first->id());
  CHECK_FALSE(backend.told_to_stop);
  engine.abort(second->id());
  REQUIRE(first->wait(30.0));
  REQUIRE(second->wait(30.0));
  CHECK(collect(*first).completions.at(0).finish_reason == FinishReason::kCancelled);
  CHECK(collect(*second).completions.at(0).finish_reason == FinishReason::kCancelled);
  CHECK(engine.stats().num_interrupts == 1);
  backend.is_slow = false;
  const auto third = engine.submit(request({7, 8}, 5));
  REQUIRE(third->wait(30.0));
  CHECK(collect(*third).completions.at(0).token_ids.size() > 0);
  engine.close();
}

}  // namespace
}  // namespace batchcore
