// What the scheduler itself costs, apart from any model. First microseconds per plan() by active
// and queued sequences, then a whole engine over a simulated backend that works through a queue of
// 100,000 requests: wall seconds against simulated ones. Usage: scheduler_bench [repetitions]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/sim_backend.h"
#include "engine/engine.h"
#include "plan_scene.h"

namespace {

using namespace batchcore;

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double microseconds_per_plan(std::int32_t active, std::int32_t queued, bool admits,
                             std::int32_t repetitions) {
  const bench::PlanScene scene(active, queued, admits);
  std::vector<double> times;
  for (std::int32_t i = 0; i < repetitions; ++i) {
    const double start = wall_seconds();
    const StepPlan plan = scene.scheduler.plan(scene.state);
    times.push_back(1e6 * (wall_seconds() - start));
    if (plan.micro_batches.empty()) std::abort();
  }
  std::nth_element(times.begin(), times.begin() + repetitions / 2, times.end());
  return times[static_cast<std::size_t>(repetitions / 2)];
}

std::shared_ptr<const Vocab> vocab() {
  auto made = std::make_shared<Vocab>();
  for (int token = 0; token < 256; ++token) made->add_piece(std::string(1, 'a'));
  return made;
}

struct Replay {
  double simulated_s = 0;
  double wall_s = 0;
  EngineStats stats;
};

// `num_requests` at once on `active` slots, on a device as fast as a large GPU.
Replay replay(std::int32_t active, std::int32_t num_requests, KvLayout layout) {
  const SimCost cost{5e-3, 20e-6, 40e-6, 1e-9};
  auto owned = std::make_unique<SimBackend>(bench::backend_info(active, layout), cost);
  SimBackend& backend = *owned;
  EngineConfig config;
  config.scheduler.max_num_seqs = active;
  config.scheduler.prefix_caching = layout == KvLayout::kUnified;
  config.max_queued_requests = num_requests;
  config.max_queued_tokens = std::int64_t{num_requests} * 1024;
  Engine engine(std::move(owned), vocab(), config, [&backend] { return backend.now(); });
  std::mt19937 random(1);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (std::int32_t i = 0; i < num_requests; ++i) {
    RequestSpec spec;
    spec.prompt.resize(20 + random() % 200);
    for (Token& token : spec.prompt) token = static_cast<Token>(random() % 256);
    spec.sampling.max_tokens = 10 + static_cast<std::int32_t>(random() % 100);
    channels.push_back(engine.submit(std::move(spec)));
  }
  const double start = wall_seconds();
  while (engine.has_work()) engine.step();
  return {backend.now(), wall_seconds() - start, engine.stats()};
}

}  // namespace

int main(int argc, char** argv) {
  const std::int32_t repetitions = argc > 1 ? std::max(std::atoi(argv[1]), 1) : 200;
  std::printf("plan(), median microseconds\n%8s %8s %12s %12s\n", "active", "queued", "slots full",
              "one free");
  for (const std::int32_t active : {16, 64, 256}) {
    for (const std::int32_t queued : {0, 1000, 100'000}) {
      std::printf("%8d %8d %12.1f %12.1f\n", active, queued,
                  microseconds_per_plan(active, queued, false, repetitions),
                  microseconds_per_plan(active, queued, true, repetitions));
    }
  }
  std::printf("\nwhole engine, simulated backend\n%8s %8s %8s %10s %8s %8s %14s %12s\n", "layout",
              "active", "requests", "simulated", "wall s", "steps", "us per step*", "preemptions");
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    for (const std::int32_t requests : {1000, 100'000}) {
      const Replay run = replay(256, requests, layout);
      std::printf("%8s %8d %8d %10.1f %8.1f %8lld %14.1f %12lld\n",
                  layout == KvLayout::kUnified ? "unified" : "streams", 256, requests,
                  run.simulated_s, run.wall_s, static_cast<long long>(run.stats.num_steps),
                  1e6 * run.wall_s / static_cast<double>(run.stats.num_steps),
                  static_cast<long long>(run.stats.num_preemptions));
    }
  }
  std::printf("* the simulated backend's own work included\n");
  return 0;
}
