// Decides what a step does. Pure policy: it reads the state, changes nothing, has no clock and no
// memory of its own, and so is tested with literal plans.
#pragma once

#include <cstdint>
#include <vector>

#include "core/preemption.h"
#include "core/scheduler_state.h"
#include "core/step_plan.h"
#include "core/tier_limits.h"

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
  QueueConfig queue;  ///< aging and fair share
  std::vector<TierLimit> tier_limits;
  /// A sequence of a worse tier gives its slot to a request of a better one that waits. Who waits
  /// counts by the priority that it came with, who runs by the tier that it had reached when it was
  /// admitted: so no two can take the slot from each other in turn. In a tier, who
  /// holds most slots gives one to a user whose turn it is and who then has no more than it.
  bool preempt_for_slots = true;
  double max_wait_s = 0.0;  ///< how long an idle engine waits for its batch to fill
  bool adaptive = false;    ///< fewer sequences where more don't pay or would miss target_itl_s
  /// Drafted tokens of a sequence that a step may verify, 0 to kMaxDrafts.
  std::int32_t num_speculative_tokens = 0;
};

class Scheduler {
 public:
  /// Throws ConfigError where tier limits leave a tier without any slot.
  explicit Scheduler(const SchedulerConfig& config)
      : config_(config), tiers_(config.tier_limits, config.max_num_seqs) {}

  [[nodiscard]] const SchedulerConfig& config() const { return config_; }
  [[nodiscard]] const TierLimits& tiers() const { return tiers_; }

  [[nodiscard]] StepPlan plan(const SchedulerState& state) const;

  /// When an idle engine stops waiting for its batch to fill; a time in the past where it does not.
  [[nodiscard]] double held_until(const SchedulerState& state) const;

  /// A slot for one more sequence: the lowest free one, else the cached one that is worth least,
  /// else -1.
  [[nodiscard]] static SeqId choose_slot(const SchedulerState& state);

 private:
  SchedulerConfig config_;
  TierLimits tiers_;
};

}  // namespace batchcore
