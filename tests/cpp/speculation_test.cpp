#include "core/speculation.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/sequence.h"
#include "scene.h"

namespace batchcore {
namespace {

using testing::numbers;
using testing::Scene;
using Counts = std::vector<std::int32_t>;

// `chance` that each draft is right where those before it were.
DraftOffer offer(std::int32_t count, double chance) {
  DraftOffer made;
  made.count = count;
  double all = 1.0;
  for (std::int32_t i = 0; i < count; ++i) {
    all *= chance;
    made.chances[static_cast<std::size_t>(i)] = all;
  }
  return made;
}

std::vector<DraftOffer> offers(std::size_t num_sequences, std::int32_t count, double chance) {
  return std::vector<DraftOffer>(num_sequences, offer(count, chance));
}

void measure(CallTimes& times, std::int32_t rows, double seconds) {
  for (int i = 0; i < 5; ++i) times.observe(rows, seconds);
}

DraftRoom room(std::int32_t plain_rows, std::int32_t extra_rows = 64) {
  DraftRoom made;
  made.plain_rows = plain_rows;
  made.extra_rows = extra_rows;
  return made;
}

// Gemma 3 270M on two cores, as docs/design.md has it.
CallTimes measured() {
  CallTimes times;
  measure(times, 1, 0.032);
  measure(times, 4, 0.048);
  measure(times, 8, 0.069);
  measure(times, 12, 0.105);
  measure(times, 16, 0.110);
  measure(times, 20, 0.143);
  measure(times, 24, 0.165);
  measure(times, 28, 0.190);
  measure(times, 32, 0.195);
  return times;
}

StepCost fitted(double call_s, double row_s) {
  StepCost cost;
  for (int i = 0; i < 400; ++i) {
    const int rows = 1 + i % 16;
    cost.observe({i % 2 == 0 ? 0 : 32, rows, 0}, call_s + row_s * (rows + (i % 2 == 0 ? 0 : 32)));
  }
  return cost;
}

TEST_CASE("one sequence has drafts verified where rows are cheap, as far as they are likely") {
  const CallTimes times = measured();
  const StepCost cost;
  CHECK(choose_drafts(offers(1, 3, 0.9), room(1), times, cost) == Counts{3});
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, cost) == Counts{7});  // 5.7 for 69 ms
  CHECK(choose_drafts(offers(1, 7, 0.6), room(1), times, cost) == Counts{3});
  CHECK(choose_drafts(offers(1, 3, 0.3), room(1), times, cost) == Counts{0});  // 1.42 for 48 ms
  CHECK(choose_drafts(offers(1, 3, 0.0), room(1), times, cost) == Counts{0});
  CHECK(choose_drafts(offers(1, 0, 0.0), room(1), times, cost) == Counts{0});
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1, 3), times, cost) == Counts{3});
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1, 0), times, cost) == Counts{0});
}

TEST_CASE("a large batch has none, unless nearly all are right") {
  const CallTimes times = measured();
  const StepCost cost;
  CHECK(choose_drafts(offers(16, 3, 0.7), room(16), times, cost) == Counts(16, 0));
  CHECK(choose_drafts(offers(16, 3, 0.0), room(16), times, cost) == Counts(16, 0));
  CHECK(choose_drafts(offers(16, 1, 0.99), room(16), times, cost) == Counts(16, 1));
}

TEST_CASE("rows go to the drafts that are likeliest") {
  const CallTimes times = measured();
  const std::vector<DraftOffer> mixed{offer(4, 0.2), offer(4, 0.95), offer(0, 0.0), offer(4, 0.5)};
  CHECK(choose_drafts(mixed, room(4), times, StepCost{}) == Counts{0, 4, 0, 0});
}

TEST_CASE("nothing is drafted before it is known what calls without drafts take") {
  CallTimes times;
  const StepCost cost = fitted(0.030, 0.001);
  CHECK(choose_drafts(offers(1, 3, 0.9), room(1), times, cost) == Counts{0});
  measure(times, 1, 0.031);
  CHECK(choose_drafts(offers(1, 3, 0.9), room(1), times, cost) == Counts{3});
  for (int i = 0; i < 101; ++i) times.observe(4, 0.034);  // and again now and then
  CHECK(choose_drafts(offers(1, 3, 0.9), room(1), times, cost) == Counts{0});
}

TEST_CASE("a size of call that was not measured is tried where the fitted cost says that it pays") {
  CallTimes times;
  measure(times, 1, 0.031);
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, fitted(0.030, 0.001)) == Counts{3});
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, fitted(0.001, 0.030)) == Counts{0});
  measure(times, 4, 0.110);  // nearly four times as much, whatever was predicted
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, fitted(0.030, 0.001)) == Counts{0});
  for (int i = 0; i < 401; ++i) times.observe(1, 0.031);  // machines get busy and idle
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, fitted(0.030, 0.001)) == Counts{3});
}

// For kernels that take any number of rows.
DraftRoom any_room(std::int32_t plain_rows, std::int32_t extra_rows = 64) {
  DraftRoom made = room(plain_rows, extra_rows);
  made.row_group = 1;
  return made;
}

TEST_CASE("where rows come in no groups, any number of drafts may be verified") {
  CallTimes times;
  for (int rows = 1; rows <= 12; ++rows) measure(times, rows, rows < 4 ? 0.030 : 0.010 * rows);
  const StepCost cost;
  CHECK(choose_drafts(offers(1, 7, 0.9), any_room(1), times, cost) == Counts{2});
  CHECK(choose_drafts(offers(3, 2, 0.9), any_room(3), times, cost) == Counts{0, 0, 0});
  CHECK(choose_drafts(offers(2, 2, 0.9), any_room(2), times, cost) == Counts{1, 0});
  // With groups of four a call of three rows is not considered.
  CHECK(choose_drafts(offers(1, 7, 0.9), room(1), times, cost) == Counts{3});
}

TEST_CASE("where rows come in no groups, four more than were measured are tried") {
  CallTimes times;
  const StepCost cost = fitted(0.030, 0.001);
  measure(times, 1, 0.031);
  CHECK(choose_drafts(offers(1, 7, 0.9), any_room(1), times, cost) == Counts{4});
  measure(times, 5, 0.035);
  CHECK(choose_drafts(offers(1, 7, 0.9), any_room(1), times, cost) == Counts{7});
  // One draft more is hardly worth a call of its own size among 16; four are.
  CallTimes busy;
  measure(busy, 16, 0.046);
  CHECK(choose_drafts(offers(16, 1, 0.99), any_room(16), busy, cost) ==
        Counts{1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  // What a row takes is not read off sizes next to each other.
  measure(busy, 17, 0.049);
  measure(busy, 20, 0.050);
  CHECK(choose_drafts(offers(16, 1, 0.99), any_room(16), busy, cost) ==
        Counts{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0});
  // Streams are measured size by size: each of these has 16 rows more.
  DraftRoom alike = any_room(16);
  alike.same_for_all = true;
  CHECK(choose_drafts(offers(16, 3, 0.99), alike, busy, cost) == Counts(16, 1));
}

TEST_CASE("where all must be alike, each has as many as the one that has fewest") {
  CallTimes times;
  measure(times, 2, 0.040);
  measure(times, 4, 0.048);
  measure(times, 6, 0.060);
  DraftRoom alike = room(2);
  alike.same_for_all = true;
  const StepCost cost = fitted(0.030, 0.001);
  CHECK(choose_drafts(offers(2, 2, 0.9), alike, times, cost) == Counts{2, 2});
  const std::vector<DraftOffer> unlike{offer(4, 0.9), offer(1, 0.9)};
  CHECK(choose_drafts(unlike, alike, times, cost) == Counts{1, 1});
  const std::vector<DraftOffer> without{offer(4, 0.9), offer(0, 0.9)};
  CHECK(choose_drafts(without, alike, times, cost) == Counts{0, 0});
  alike.extra_rows = 3;
  CHECK(choose_drafts(offers(2, 2, 0.9), alike, times, cost) == Counts{1, 1});
}

TEST_CASE("a call with drafts takes no longer than tokens may") {
  DraftRoom hurried = room(1);
  hurried.longest_s = 0.050;
  CHECK(choose_drafts(offers(1, 7, 0.9), hurried, measured(), StepCost{}) == Counts{3});
  hurried.longest_s = 0.040;
  CHECK(choose_drafts(offers(1, 7, 0.9), hurried, measured(), StepCost{}) == Counts{0});
}

TEST_CASE("rates are a sequence's own as soon as it has any, and the engine's before") {
  DraftRates own(16.0);
  DraftRates engine(64.0);
  const Draft draft{{1, 2, 3}, 4};
  CHECK(make_offer(draft, 10, own, engine).chances[0] == doctest::Approx(0.25));
  for (int i = 0; i < 200; ++i) engine.record(4, true);
  for (int i = 0; i < 200; ++i) engine.record(5, i % 2 == 0);
  const DraftOffer fresh = make_offer(draft, 10, own, engine);
  CHECK(fresh.count == 3);
  CHECK(fresh.kv_tokens == 10);
  CHECK(fresh.chances[0] == doctest::Approx(0.95).epsilon(0.02));
  // Behind a right token the run is longer by one.
  CHECK(fresh.chances[1] == doctest::Approx(0.95 * 0.48).epsilon(0.05));
  for (int i = 0; i < 40; ++i) own.record(4, false);
  CHECK(make_offer(draft, 10, own, engine).chances[0] < 0.15);
}

TEST_CASE("no more is drafted than may be produced, fits, and can be taken back") {
  Scene scene(KvLayout::kStreams, 160, 4);  // 40 cells each
  BackendInfo& info = scene.state.info;
  CHECK(most_drafts(scene.runs(0, numbers(1, 4), 3, 30), info, 8) == 8);
  CHECK(most_drafts(scene.runs(1, numbers(1, 4), 3, 3), info, 8) == 2);
  CHECK(most_drafts(scene.runs(2, numbers(1, 36), 35, 30), info, 8) == 4);
  const Sequence& longer = scene.runs(3, numbers(1, 12), 11, 25);
  CHECK(most_drafts(longer, info, 99) == kMaxDrafts);
  info.memory = MemoryKind::kSlidingWindow;
  info.window = 8;
  CHECK(most_drafts(longer, info, 8) == 8);
  info.memory = MemoryKind::kRecurrent;
  CHECK(most_drafts(longer, info, 8) == 0);
}

// A scene in which drafts pay.
struct DraftScene : Scene {
  explicit DraftScene(KvLayout layout, std::int32_t num_cells = 400) : Scene(layout, num_cells, 8) {
    config.num_speculative_tokens = 4;
    config.max_num_seqs = 6;
    state.info.max_outputs = 16;
    for (int rows = 1; rows <= 16; ++rows) measure(state.call_times, rows, 0.030 + 0.001 * rows);
    for (int i = 0; i < 100; ++i) {
      for (int length = 2; length <= 5; ++length) state.draft_rates.record(length, true);
    }
  }
  Sequence& drafts(SeqId slot, std::size_t count) {
    Sequence& sequence = runs(slot, numbers(1, 8), 7, 50);
    sequence.draft = {numbers(20, count), 5};
    return sequence;
  }
  [[nodiscard]] Counts planned() const {
    const StepPlan made = plan();
    Counts counts;
    for (const PlannedRows& rows : made.micro_batches.at(0).rows) counts.push_back(rows.num_drafts);
    return counts;
  }
};

TEST_CASE("a plan has rows for drafts where there is room, and none otherwise") {
  DraftScene scene(KvLayout::kUnified);
  scene.drafts(0, 4);
  scene.drafts(1, 2);
  scene.drafts(2, 0);
  CHECK(scene.planned() == Counts{4, 2, 0});
  SUBCASE("never beyond the call's rows and its logits") {
    scene.state.info.max_outputs = 7;
    CHECK(scene.planned() == Counts{2, 2, 0});
    scene.state.info.max_outputs = 16;
    scene.state.info.n_ubatch = 4;
    CHECK(scene.planned() == Counts{1, 0, 0});
  }
  SUBCASE("with free cells only, and nothing cached is given up for them") {
    scene.state.info.num_cells = 24 + 1;
    scene.caches(5, {1, 90}, 1);
    const StepPlan tight = scene.plan();
    CHECK(tight.evictions == std::vector<SeqId>{5});  // for the sequences themselves
    scene.state.info.num_cells = 26 + 3;
    CHECK(scene.plan().evictions.empty());
    CHECK(scene.planned() == Counts{2, 1, 0});
  }
  SUBCASE("not beside a prompt") {
    scene.waits(numbers(40, 5));
    CHECK(scene.planned() == Counts{0, 0, 0, 0});
  }
  SUBCASE("not where it is off") {
    scene.config.num_speculative_tokens = 0;
    CHECK(scene.planned() == Counts{0, 0, 0});
  }
}

TEST_CASE("a plan's drafts come in any number where kernels take any number of rows") {
  DraftScene scene(KvLayout::kUnified);
  scene.state.info.row_group = 1;
  for (int rows = 16; rows >= 4; --rows) measure(scene.state.call_times, rows, 0.040 * rows);
  measure(scene.state.call_times, 1, 0.031);
  scene.drafts(0, 4);
  CHECK(scene.planned() == Counts{2});
  CHECK(scene.plan().micro_batches.at(0).filler_slots.empty());
  scene.state.info.row_group = 4;
  CHECK(scene.planned() == Counts{0});
}

TEST_CASE("streams have as many drafts each, and none beside a dummy row") {
  DraftScene scene(KvLayout::kStreams);
  scene.drafts(0, 4);
  CHECK(scene.planned() == Counts{4});
  scene.drafts(1, 2);
  CHECK(scene.planned() == Counts{2, 2});
  scene.drafts(3, 4);
  const StepPlan bridged = scene.plan();
  CHECK(bridged.micro_batches.at(0).filler_slots == std::vector<SeqId>{2});
  CHECK(scene.planned() == Counts{0, 0, 0});
  scene.drafts(2, 3);
  CHECK(scene.planned() == Counts{2, 2, 2, 2});
}

}  // namespace
}  // namespace batchcore
