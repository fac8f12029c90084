// Decides what a step does. Pure policy: it reads the state, changes nothing, has no clock and no
// memory of its own, and so is tested with literal plans.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/kv_tree.h"
#include "core/output_history.h"
#include "core/preemption.h"
#include "core/sequence.h"
#include "core/step_cost.h"
#include "core/step_plan.h"
#include "core/waiting_queue.h"

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

/// All that a plan depends on. The engine owns and updates it.
struct SchedulerState {
  SchedulerState(const BackendInfo& backend)
      : info(backend),
        kv(backend.num_slots, backend.layout == KvLayout::kUnified),
        last_used(static_cast<std::size_t>(backend.num_slots), 0),
        pinned(static_cast<std::size_t>(backend.num_slots), false) {}

  BackendInfo info;
  std::vector<Sequence*> running;  ///< hold a slot, in the order of their rank
  WaitingQueue waiting;
  KvTree kv;
  std::vector<std::uint64_t> last_used;  ///< step in which a slot last served, by slot
  std::vector<bool> pinned;              ///< cached slots that are never evicted, by slot
  StepCost cost;
  CopySpeed copy_speed;
  OutputHistory history;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config) : config_(config) {}

  [[nodiscard]] const SchedulerConfig& config() const { return config_; }

  [[nodiscard]] StepPlan plan(const SchedulerState& state) const;

  /// A slot for one more sequence: the lowest free one, else the least recently used cached one
  /// that is not in `keep`, else -1.
  [[nodiscard]] SeqId choose_slot(const SchedulerState& state, std::span<const SeqId> keep) const;

 private:
  SchedulerConfig config_;
};

}  // namespace batchcore
