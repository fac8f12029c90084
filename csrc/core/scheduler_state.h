// What the scheduler decides on: one engine's sequences, queue, KV account and what it has learnt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/backend.h"
#include "core/call_times.h"
#include "core/host_cache.h"
#include "core/kv_tree.h"
#include "core/output_history.h"
#include "core/preemption.h"
#include "core/sequence.h"
#include "core/speculation.h"
#include "core/step_cost.h"
#include "core/waiting_queue.h"

namespace batchcore {

/// All that a plan depends on. The engine owns and updates it.
struct SchedulerState {
  static constexpr double kDraftMemory = 64.0;  ///< drafted tokens

  explicit SchedulerState(const BackendInfo& backend, const QueueConfig& queue = {})
      : info(backend),
        waiting(queue),
        kv(backend.num_slots, backend.layout == KvLayout::kUnified),
        last_used(static_cast<std::size_t>(backend.num_slots), 0),
        pinned(static_cast<std::size_t>(backend.num_slots), false) {}

  [[nodiscard]] bool serves_whole_slots_only() const {
    return info.memory == MemoryKind::kRecurrent || info.memory == MemoryKind::kHybrid;
  }

  BackendInfo info;
  double now = 0.0;        ///< on the engine's clock
  bool is_paused = false;  ///< nobody is admitted who was not before
  /// Sequences that may run, where that is fewer than SchedulerConfig::max_num_seqs.
  std::int32_t batch_size_limit = std::numeric_limits<std::int32_t>::max();
  std::vector<Sequence*> running;  ///< hold a slot, in the order of their rank
  WaitingQueue waiting;
  KvTree kv;
  std::uint64_t step = 0;                ///< number of the step that is being planned
  std::vector<std::uint64_t> last_used;  ///< step in which a slot last served, by slot
  std::vector<bool> pinned;  ///< cached slots to evict only where nothing else helps, by slot
  HostCache host;            ///< prefixes that were evicted to host memory
  StepCost cost;
  CallTimes call_times;
  DraftRates draft_rates{kDraftMemory};  ///< of all sequences
  CopySpeed copy_speed;
  OutputHistory history;
};

}  // namespace batchcore
