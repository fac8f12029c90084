// Tiers where slots are short: who takes one from whom, limits and reserves.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "core/errors.h"
#include "core/tier_limits.h"
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

TEST_CASE("limits go by groups of tiers, best first") {
  const TierLimits limits({{5, 2, 0}, {0, 0, 3}}, 8);
  const std::vector<std::int32_t> tiers{-7, 0, 1, 4, 5, 6};
  std::vector<std::int32_t> groups;
  for (const std::int32_t tier : tiers) groups.push_back(limits.group_of(tier));
  CHECK(groups == std::vector<std::int32_t>{0, 1, 2, 2, 3, 4});
  std::vector<std::int32_t> running(static_cast<std::size_t>(limits.num_groups()), 0);
  CHECK(limits.room_for(0, running, 8) == 8);
  CHECK(limits.room_for(1, running, 8) == 8);
  CHECK(limits.room_for(2, running, 8) == 5);  // three are kept for tier 0
  CHECK(limits.room_for(3, running, 8) == 2);  // its own limit
  CHECK(limits.room_for(4, running, 8) == 5);
  running[1] = 2;
  running[3] = 1;
  CHECK(limits.room_for(2, running, 5) == 4);
  CHECK(limits.room_for(3, running, 5) == 1);
  CHECK(limits.room_for(2, running, 1) == 0);
  CHECK(limits.most_of(3) == 2);
  CHECK(limits.most_of(4) == 5);
  CHECK(TierLimits({}, 8).room_for(0, std::vector<std::int32_t>{4}, 4) == 4);
}

TEST_CASE("limits that leave a tier nothing are refused") {
  CHECK_THROWS_AS(TierLimits({{0, 0, 4}}, 4), ConfigError);
  CHECK_THROWS_AS(TierLimits({{0, 0, 1}, {0, 1, 0}}, 4), ConfigError);
  CHECK_THROWS_AS(TierLimits({{0, -1, 0}}, 4), ConfigError);
}

TEST_CASE("a better tier takes the slot of who ranks last in a worse one") {
  auto scene = std::make_unique<Scene>();
  scene->runs(0, numbers(1, 3), 2, 4, 1);
  scene->runs(1, numbers(10, 3), 2, 4, 2);
  scene->runs(2, numbers(20, 3), 2, 4, 2);
  scene->waits({40, 41}, 4, 2);
  CHECK(scene->plan().preemptions.empty());  // nobody of its own tier
  scene->waits({50, 51}, 4, 1);
  const StepPlan plan = scene->plan();
  CHECK(plan.preemptions == std::vector<Sequence*>{scene->all[2].get()});
  CHECK(plan.num_slot_preemptions == 1);
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].sequence->request_id == 5);
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x1 2x1 5x2");
  SUBCASE("not where that is turned off") {
    scene->config.preempt_for_slots = false;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not from one that gave way too often") {
    scene->all[2]->num_preemptions = scene->config.max_preemptions;
    CHECK(scene->plan().preemptions == std::vector<Sequence*>{scene->all[1].get()});
    scene->all[1]->num_preemptions = scene->config.max_preemptions;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not from one that had aged into that tier when it was admitted") {
    scene->all[2]->lift = 1;
    CHECK(scene->plan().preemptions == std::vector<Sequence*>{scene->all[1].get()});
  }
  SUBCASE("not while admission is paused") {
    scene->state.is_paused = true;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not where its cells would not be enough") {
    scene->state.waiting.erase(scene->all[4].get());
    scene->waits(numbers(50, 57), 4, 1);  // 64 cells, 4 of them taken by who stays
    const StepPlan none = scene->plan();
    CHECK(none.preemptions.empty());
    CHECK(none.num_slot_preemptions == 0);
    CHECK(Scene::rows(none.micro_batches.at(0)) == "1x1 2x1 3x1");
  }
}

TEST_CASE("completions that fork take as many slots as they need, or none") {
  Scene scene;
  scene.runs(0, numbers(1, 3), 2, 4, 0);
  scene.runs(1, numbers(10, 3), 2, 4, 2);
  scene.runs(2, numbers(20, 3), 2, 4, 2);
  scene.waits({50, 51}, 4, 0).num_forks = 1;
  CHECK(scene.plan().preemptions == std::vector<Sequence*>{scene.all[2].get(), scene.all[1].get()});
  scene.all[3]->num_forks = 2;
  CHECK(scene.plan().preemptions.empty());
}

TEST_CASE("who has only aged takes no slot, and stands in nobody's way who may") {
  Scene scene;
  scene.runs(0, numbers(1, 3), 2, 4, 0);
  scene.runs(1, numbers(10, 3), 2, 4, 1);
  scene.runs(2, numbers(20, 3), 2, 4, 3);
  Sequence& aged = scene.add({40, 41}, 4, 3);
  aged.lift = 3;
  scene.state.waiting.push(&aged);
  CHECK(scene.plan().preemptions.empty());
  scene.waits({50, 51}, 4, 0);
  const StepPlan plan = scene.plan();
  CHECK(plan.preemptions == std::vector<Sequence*>{scene.all[2].get()});
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].sequence->request_id == 5);
}

TEST_CASE("a tier at its limit waits, others pass it") {
  Scene scene;
  scene.config.tier_limits = {{1, 1, 0}};
  const TierLimits limits(scene.config.tier_limits, scene.config.max_num_seqs);
  const auto grouped = [&](Sequence& sequence) -> Sequence& {
    sequence.tier_group = limits.group_of(sequence.rank.priority);
    return sequence;
  };
  grouped(scene.runs(0, numbers(1, 3), 2, 4, 1));
  for (const std::int32_t priority : {1, 1, 2, 2}) {
    scene.state.waiting.push(&grouped(scene.add({40 + priority, 50}, 4, priority)));
  }
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 2);
  CHECK(plan.admissions[0].sequence->request_id == 4);
  CHECK(plan.admissions[1].sequence->request_id == 5);
}

TEST_CASE("reserved slots stay free for the better tier, and are no limit to it") {
  for (const std::int32_t arriving : {0, 1}) {
    Scene scene;
    scene.config.tier_limits = {{0, 0, 2}};
    const TierLimits limits(scene.config.tier_limits, scene.config.max_num_seqs);
    for (int i = 0; i < 3; ++i) {
      Sequence& sequence = scene.add({40 + i, 50}, 4, arriving);
      sequence.tier_group = limits.group_of(arriving);
      scene.state.waiting.push(&sequence);
    }
    CHECK(scene.plan().admissions.size() == (arriving == 0 ? 3 : 1));
  }
}

TEST_CASE("the batch size bounds admissions, but not below one request") {
  Scene scene;
  scene.state.batch_size_limit = 2;
  for (int i = 0; i < 3; ++i) scene.waits({40 + i, 50});
  CHECK(scene.plan().admissions.size() == 2);
  Scene many;
  many.state.batch_size_limit = 1;
  many.waits({40, 50}).num_forks = 2;
  CHECK(many.plan().admissions.size() == 1);
}

TEST_CASE("a swap for a better tier makes no batch larger that is too large already") {
  Scene scene;
  scene.state.batch_size_limit = 1;
  scene.runs(0, numbers(1, 3), 2, 4, 1);
  scene.runs(1, numbers(10, 3), 2, 4, 2);
  scene.waits({50, 51}, 4, 0);
  scene.waits({60, 61}, 4, 0);
  scene.waits({70, 71}, 4, 0);
  const StepPlan plan = scene.plan();
  CHECK(plan.preemptions == std::vector<Sequence*>{scene.all[1].get(), scene.all[0].get()});
  CHECK(plan.admissions.size() == 2);
}

TEST_CASE("a held batch waits for more until its time, and only where nobody runs") {
  Scene scene;
  scene.config.max_wait_s = 0.5;
  scene.state.now = 10.2;
  scene.waits({40, 41}).arrived_at = 10.1;
  scene.waits({50, 51}).arrived_at = 10.0;
  const Scheduler scheduler(scene.config);
  CHECK(scheduler.held_until(scene.state) == 10.5);
  CHECK(scene.plan().empty());
  SUBCASE("the oldest has waited long enough") {
    scene.state.now = 10.5;
    CHECK(scene.plan().admissions.size() == 2);
  }
  SUBCASE("as many wait as may run") {
    scene.waits({60, 61}).arrived_at = 10.2;
    CHECK(scene.plan().admissions.size() == 3);
  }
  SUBCASE("somebody runs") {
    scene.runs(0, numbers(1, 3), 2);
    CHECK(scene.plan().admissions.size() == 2);
  }
}

TEST_CASE("two tiers in turn do not thrash: who gave way four times is left alone") {
  SimOptions options;
  options.max_num_seqs = 2;
  options.num_cells = 1024;
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> low;
  std::vector<std::shared_ptr<RequestChannel>> high;
  const auto submit = [&sim](std::int32_t priority, int length, int id) {
    RequestSpec spec = request({1, static_cast<Token>(1 + id % 60)}, length);
    spec.sampling.ignore_eos = true;
    spec.priority = priority;
    return sim.engine.submit(std::move(spec));
  };
  for (int i = 0; i < 6; ++i) low.push_back(submit(1, 60, i));
  for (int i = 0; i < 40; ++i) {
    high.push_back(submit(0, 5, i));
    for (int step = 0; step < 10; ++step) sim.engine.step();
  }
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_slot_preemptions > 0);
  CHECK(sim.engine.stats().num_slot_preemptions <= 6 * 4);
  for (const auto& channel : low) {
    const testing::Result result = collect(*channel);
    CHECK(result.completions.at(0).token_ids.size() == 60);
    CHECK(result.metrics.num_preemptions <= 4);
  }
  double worst = 0.0;
  for (std::size_t i = 0; i < high.size(); ++i) {
    const RequestMetrics metrics = collect(*high[i]).metrics;
    CHECK(metrics.num_preemptions == 0);
    // While the low tier may still be pushed aside, nobody of the high one waits for a slot.
    if (i < 4) worst = std::max(worst, metrics.admitted_s - metrics.arrival_s);
  }
  CHECK(worst < 0.05);
}

TEST_CASE("tier limits and reserves hold in every step, and everybody is served") {
  SimOptions options;
  options.max_num_seqs = 4;
  options.num_cells = 2048;
  options.adjust = [](EngineConfig& config) {
    config.scheduler.tier_limits = {{0, 0, 1}, {2, 2, 0}};
    config.scheduler.queue.aging_s = 0.5;
  };
  SimEngine sim(options);
  std::mt19937 random(6);
  RequestSpec large = request({1}, 1);
  large.sampling.n = 4;
  large.priority = 1;
  CHECK_THROWS_AS((void)sim.engine.submit(large), InvalidRequestError);  // three at most
  std::vector<std::shared_ptr<RequestChannel>> channels;
  std::int32_t most[3] = {};
  for (int i = 0; i < 600; ++i) {
    RequestSpec spec = request(numbers(1, 1 + random() % 20), 1 + static_cast<int>(random() % 20));
    spec.priority = static_cast<std::int32_t>(random() % 3);
    spec.sampling.n = 1 + static_cast<std::int32_t>(random() % 2);
    channels.push_back(sim.engine.submit(std::move(spec)));
    for (unsigned k = random() % 16; k > 0; --k) {
      sim.engine.step();
      const EngineStats stats = sim.engine.stats();
      std::int32_t running[3] = {};
      for (std::int32_t t = 0; t < stats.num_tiers; ++t) {
        const TierCount& tier = stats.tiers[static_cast<std::size_t>(t)];
        running[tier.priority] = tier.num_running;
        most[tier.priority] = std::max(most[tier.priority], tier.num_running);
      }
      REQUIRE(running[2] <= 2);
      REQUIRE(running[1] + running[2] <= 3);
    }
  }
  REQUIRE(sim.run());
  CHECK(most[0] == 4);
  CHECK(most[1] == 3);
  CHECK(most[2] == 2);
  for (const auto& channel : channels) CHECK(channel->is_finished());
}

// Two slots held by the second user (the empty name is the first), one by the first.
std::unique_ptr<Scene> two_users() {
  auto scene = std::make_unique<Scene>(KvLayout::kUnified, 64, 6);
  WaitingQueue& waiting = scene->state.waiting;
  const UserId flood = waiting.enter("flood");
  waiting.enter("");
  scene->runs(0, numbers(1, 3), 2).user = flood;
  scene->runs(1, numbers(10, 3), 2);
  scene->runs(2, numbers(20, 3), 2).user = flood;
  waiting.charge(flood, 50.0);
  return scene;
}

TEST_CASE("who has fewer slots gets one of who has most, and the cells of that one stay") {
  const auto scene = two_users();
  WaitingQueue& waiting = scene->state.waiting;
  Sequence& quiet = scene->add({40, 41}, 4);
  quiet.user = waiting.enter("quiet");
  waiting.push(&quiet);
  const StepPlan plan = scene->plan();
  CHECK(plan.preemptions == std::vector<Sequence*>{scene->all[2].get()});
  CHECK(plan.parked == plan.preemptions);
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].slot == 3);  // not the one that is kept
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x1 2x1 4x2");
  SUBCASE("not where others were served less") {
    waiting.charge(quiet.user, 60.0);
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not from one that gave way too often") {
    scene->all[2]->num_preemptions = scene->config.max_preemptions;
    CHECK(scene->plan().preemptions == std::vector<Sequence*>{scene->all[0].get()});
  }
  SUBCASE("not where it would then have more") {
    scene->all[1]->user = quiet.user;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not of a better tier") {
    quiet.rank.priority = 1;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("not where that is turned off") {
    scene->config.preempt_for_slots = false;
    CHECK(scene->plan().preemptions.empty());
  }
  SUBCASE("where there is no slot to keep the cells in, they are given up") {
    for (SeqId slot = 3; slot < 6; ++slot) {
      scene->caches(slot, numbers(50 + 3 * slot, 2), 1);
      scene->state.pinned[static_cast<std::size_t>(slot)] = true;
    }
    const StepPlan tight = scene->plan();
    CHECK(tight.preemptions == std::vector<Sequence*>{scene->all[2].get()});
    CHECK(tight.parked.empty());
    REQUIRE(tight.admissions.size() == 1);
    CHECK(tight.admissions[0].slot == 2);
  }
}

TEST_CASE("who gave way to another user goes on where it was, and computes nothing twice") {
  SimOptions options;
  options.num_slots = 8;
  options.max_num_seqs = 2;
  SimEngine sim(options);
  const auto submit = [&](const std::string& user, Token token) {
    RequestSpec spec = request({token, 2, 3, 4, 5, 6}, 20);
    spec.sampling.ignore_eos = true;
    spec.user = user;
    return sim.engine.submit(std::move(spec));
  };
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (Token token = 10; token < 14; ++token) channels.push_back(submit("flood", token));
  for (int i = 0; i < 5; ++i) sim.engine.step();
  channels.push_back(submit("quiet", 20));
  sim.engine.step();
  CHECK(sim.engine.stats().num_slot_preemptions == 1);
  const EngineStats before = sim.engine.stats();
  CHECK(before.num_saves == 0);
  REQUIRE(sim.run());
  const EngineStats after = sim.engine.stats();
  CHECK(after.num_slot_preemptions == 1);
  // Every prompt token and every output token but the last of each, once.
  CHECK(after.num_prefill_tokens + after.num_decode_rows == 5 * (6 + 19));
}

}  // namespace
}  // namespace batchcore
