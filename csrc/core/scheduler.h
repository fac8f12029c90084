// Decides what a step does. Pure policy: it reads the state, changes nothing, has no clock and no
// memory of its own, and so is tested with literal plans.
#pragma once

#include <cstdint>

#include "core/preemption.h"
#include "core/scheduler_state.h"
#include "core/step_plan.h"

namespace batchcore {

/// How prefill shares a step with sequences that decode.
enum class PrefillPolicy {
  kLatency,     ///< smallest chunks: decoding sequences hardly notice a prompt that arrives
  kBalanced,    ///< chunks as large as the target inter-token latency allows
  kThroughput,  ///< whole micro-batches
};

struct SchedulerConfig {
  std::int32_t max_num_seqs = 16;
  PrefillPolicy prefill_policy = PrefillPolicy::kBalanced;
  double target_itl_s = 0.0;  ///< 0: a multiple of what a step without prefill takes
  bool prefix_caching = true;
  std::int32_t max_preemptions = 4;  ///< after as many a sequence is no victim any more
  PreemptionMode preemption = PreemptionMode::kAuto;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config) : config_(config) {}

  [[nodiscard]] const SchedulerConfig& config() const { return config_; }

  [[nodiscard]] StepPlan plan(const SchedulerState& state) const;

  /// A slot for one more sequence: the lowest free one, else the cached one that is worth least,
  /// else -1.
  [[nodiscard]] static SeqId choose_slot(const SchedulerState& state);

 private:
  SchedulerConfig config_;
};

}  // namespace batchcore
