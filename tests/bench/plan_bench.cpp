// What deciding on one step costs, by the sequences that run and those that wait. plan() changes
// nothing, so one state serves all iterations.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>

#include "bench_fixture.h"
#include "core/step_plan.h"
#include "plan_scene.h"

namespace {

using namespace batchcore;

void plan_with(benchmark::State& state, const bench::PlanScene& scene, std::size_t num_admitted) {
  for (auto _ : state) {
    StepPlan plan = scene.scheduler.plan(scene.state);
    benchmark::DoNotOptimize(plan);
    if (plan.admissions.size() != num_admitted || plan.micro_batches.empty()) {
      state.SkipWithError("the plan is not the one that is meant");
      break;
    }
  }
}

// `free` slots: with one, somebody who waits is admitted.
void plan(benchmark::State& state) {
  const auto num_slots = static_cast<std::int32_t>(state.range(0));
  const auto num_queued = static_cast<std::int32_t>(state.range(1));
  const bool admits = state.range(2) > 0;
  const auto& scene = bench::fixture<bench::PlanScene>(num_slots, num_queued, admits, 1);
  plan_with(state, scene, admits && num_queued > 0 ? 1 : 0);
}
BENCHMARK(plan)
    ->ArgNames({"running", "queued", "free"})
    ->ArgsProduct({{16, 256}, {0, 1000, 100'000}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

// All slots taken, by users who have the same share of them: who might take one from whom is looked
// at, and nobody does.
void plan_many_users(benchmark::State& state) {
  const auto num_slots = static_cast<std::int32_t>(state.range(0));
  const auto num_queued = static_cast<std::int32_t>(state.range(1));
  const auto& scene = bench::fixture<bench::PlanScene>(num_slots, num_queued, false, num_slots);
  plan_with(state, scene, 0);
}
BENCHMARK(plan_many_users)
    ->ArgNames({"running", "queued"})
    ->ArgsProduct({{16, 256}, {1000, 100'000}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
