#include "core/scheduler.h"

#include <algorithm>
#include <limits>

#include "core/eviction.h"
#include "core/planner.h"
#include "core/queue_cursor.h"

namespace batchcore {

StepPlan Scheduler::plan(const SchedulerState& state) const {
  return Planner(config_, tiers_, state).plan(held_until(state) <= state.now);
}

double Scheduler::held_until(const SchedulerState& state) const {
  constexpr double kNow = -std::numeric_limits<double>::infinity();
  const auto most =
      static_cast<std::size_t>(std::min(config_.max_num_seqs, state.batch_size_limit));
  const WaitingQueue& waiting = state.waiting;
  if (config_.max_wait_s <= 0.0 || !state.running.empty() || waiting.empty() ||
      waiting.num_preempted() > 0 || waiting.size() >= most) {
    return kNow;
  }
  double oldest = std::numeric_limits<double>::infinity();
  std::size_t num_sequences = 0;
  QueueCursor cursor(waiting);
  while (const Sequence* sequence = cursor.next()) {  // fewer than the slots
    oldest = std::min(oldest, sequence->arrived_at);
    num_sequences += 1 + static_cast<std::size_t>(sequence->num_forks);
  }
  return num_sequences >= most ? kNow : oldest + config_.max_wait_s;
}

SeqId Scheduler::choose_slot(const SchedulerState& state) {
  for (SeqId slot = 0; slot < state.info.num_slots; ++slot) {
    if (state.kv.state(slot) == KvTree::SlotState::kFree) return slot;
  }
  return least_worth(state, {}, {}, true);
}

}  // namespace batchcore
