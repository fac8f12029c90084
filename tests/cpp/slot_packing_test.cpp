// Streams: sequences that move into the slots between them.
#include "core/slot_packing.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "scene.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::numbers;
using testing::request;
using testing::Scene;
using testing::SimEngine;
using testing::SimOptions;
using Tokens = std::vector<Token>;

std::string chosen(const Scene& scene) {
  const auto swap = choose_swap(scene.state);
  if (!swap) return "none";
  return std::to_string(swap->sequence->slot) + " to " + std::to_string(swap->to);
}

TEST_CASE("the highest sequence goes to the lowest slot between others") {
  Scene scene(KvLayout::kStreams, 160, 8);
  CHECK(chosen(scene) == "none");
  scene.runs(2, numbers(1, 4), 3);
  CHECK(chosen(scene) == "none");  // below all of them is no gap
  scene.runs(3, numbers(1, 4), 3);
  CHECK(chosen(scene) == "none");
  scene.runs(6, numbers(1, 4), 3);
  CHECK(chosen(scene) == "6 to 4");
  scene.runs(4, numbers(1, 4), 1);  // of a prompt: will decode there soon
  CHECK(chosen(scene) == "6 to 5");
  scene.runs(7, numbers(1, 4), 1);
  CHECK(chosen(scene) == "none");
}

TEST_CASE("nobody moves where the gap is filled anyway, or ids need not be dense") {
  for (const KvLayout layout : {KvLayout::kStreams, KvLayout::kUnified}) {
    Scene scene(layout, 160, 8);
    scene.runs(0, numbers(1, 4), 3);
    scene.runs(2, numbers(1, 4), 3);
    CHECK(chosen(scene) == (layout == KvLayout::kStreams ? "2 to 1" : "none"));
    scene.waits(numbers(1, 4));
    CHECK(chosen(scene) == "none");
  }
}

TEST_CASE("nor where a copy would keep less than the slot") {
  Scene scene(KvLayout::kStreams, 160, 8);
  scene.state.info.memory = MemoryKind::kSlidingWindow;
  scene.state.info.window = 8;
  scene.runs(0, numbers(1, 4), 3);
  scene.runs(2, numbers(1, 9), 8);
  CHECK(chosen(scene) == "2 to 1");
  scene.caches(1, numbers(1, 9), 1);
  CHECK(chosen(scene) == "none");
}

TEST_CASE("a move pays where the rows that it saves take longer than the copy") {
  Sequence sequence;
  sequence.tokens = numbers(1, 10);
  sequence.max_tokens_total = 100;
  StepCost cost;
  CopySpeed copy;
  for (int i = 0; i < 50; ++i) copy.observe(1'000'000, 0.001);
  CHECK_FALSE(swap_pays(sequence, 1000, cost, copy));  // nothing is known yet
  for (int i = 0; i < 200; ++i) {
    const int rows = 1 + i % 8;
    const int prefill = i % 2 == 0 ? 0 : 16;
    cost.observe({prefill, rows, 50 * (37 * i % 50)}, 0.010 + 0.002 * rows + 0.001 * prefill);
  }
  CHECK(swap_pays(sequence, 30'000'000, cost, copy));  // 60 ms against 32 x 2 ms
  CHECK_FALSE(swap_pays(sequence, 35'000'000, cost, copy));
  sequence.max_tokens_total = 11;
  CHECK_FALSE(swap_pays(sequence, 2'000'000, cost, copy));
}

/// Remembers the sequences of the last call; refuses to restore where a test says so.
struct WatchedBackend : SimBackend {
  using SimBackend::SimBackend;

  DecodeStatus decode(const MicroBatch& batch) override {
    last = std::set<SeqId>(batch.seq_ids.begin(), batch.seq_ids.end());
    return SimBackend::decode(batch);
  }
  std::size_t save(SeqId seq_id, std::span<std::uint8_t> into) override {
    if (num_saves_to_fail > 0 && num_saves_to_fail-- > 0) return 0;
    num_saves += 1;
    return SimBackend::save(seq_id, into);
  }
  bool restore(SeqId seq_id, std::span<const std::uint8_t> from) override {
    num_restores += 1;
    return !refuses && SimBackend::restore(seq_id, from);
  }

  std::set<SeqId> last;
  int num_saves = 0;
  int num_restores = 0;
  int num_saves_to_fail = 0;
  bool refuses = false;
};

SimOptions streams() {
  SimOptions options;
  options.layout = KvLayout::kStreams;
  options.num_slots = 6;
  options.max_num_seqs = 6;
  options.num_cells = 6 * 256;
  return options;
}

Tokens alone(const Tokens& prompt, std::int32_t max_tokens) {
  SimEngine sim(streams());
  const auto channel = sim.engine.submit(request(prompt, max_tokens));
  REQUIRE(sim.run());
  return collect(*channel).completions.at(0).token_ids;
}

TEST_CASE("a batch that drains stays dense, and outputs are what they are alone") {
  const SimOptions options = streams();
  auto owned = std::make_unique<WatchedBackend>(testing::sim_info(options), options.cost);
  WatchedBackend& backend = *owned;
  SUBCASE("moved") {}
  SUBCASE("where a copy can't be restored") { backend.refuses = true; }
  SUBCASE("where nothing can be saved") { backend.num_saves_to_fail = 1000; }
  SimEngine sim(std::move(owned), options);
  const std::vector<std::int32_t> lengths{40, 6, 8, 40, 10, 40};
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const auto first = static_cast<Token>(3 * i + 1);
    channels.push_back(sim.engine.submit(request(numbers(first, 5 + i), lengths[i])));
  }
  for (int i = 0; i < 30; ++i) (void)sim.engine.step();
  CHECK((sim.engine.stats().num_slot_moves > 0) == (backend.num_saves > 0));
  if (backend.num_saves > 0 && !backend.refuses) {
    CHECK(*backend.last.rbegin() <= 3);  // three, and a dummy row where four are tried
    CHECK(backend.num_restores > 0);
  }
  REQUIRE(sim.run());
  CHECK((backend.num_saves > 0) == (backend.num_saves_to_fail == 0));
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const auto first = static_cast<Token>(3 * i + 1);
    CHECK(collect(*channels[i]).completions.at(0).token_ids ==
          alone(numbers(first, 5 + i), lengths[i]));
  }
}

TEST_CASE("a cached prefix that is moved out of the way still serves, pinned or not") {
  for (const bool pins : {false, true}) {
    SimEngine sim(streams());
    RequestSpec first = request(numbers(1, 4), 30);
    RequestSpec second = request(Tokens(80, 9), 3);
    second.pins = pins;
    RequestSpec third = request(numbers(20, 4), 30);
    (void)sim.engine.submit(std::move(first));
    const auto cached = sim.engine.submit(std::move(second));
    (void)sim.engine.submit(std::move(third));
    for (int i = 0; i < 20; ++i) (void)sim.engine.step();
    CHECK(sim.engine.stats().num_pinned == (pins ? 1 : 0));
    CHECK(sim.engine.stats().num_slot_moves == 1);
    const auto again = sim.engine.submit(request(Tokens(90, 9), 3));
    REQUIRE(sim.run());
    CHECK(collect(*again).metrics.num_cached_tokens >= 80);
    if (pins) sim.engine.unpin(cached->id());
    (void)sim.engine.step();
    CHECK(sim.engine.stats().num_pinned == 0);
  }
}

}  // namespace
}  // namespace batchcore
