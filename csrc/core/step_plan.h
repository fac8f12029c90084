// What one step does, decided by Scheduler::plan() and carried out by the engine in the order of
// the fields.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/host_cache.h"
#include "core/sequence.h"
#include "core/types.h"

namespace batchcore {

/// A waiting sequence that gets a slot.
struct Admission {
  Sequence* sequence = nullptr;
  SeqId slot = -1;
  SeqId prefix_slot = -1;  ///< who holds its prefix; == slot where a cached slot is taken over
  std::int32_t prefix_length = 0;                ///< tokens that need not be computed
  std::shared_ptr<const HostCache::Entry> host;  ///< holds them, where no slot does
};

/// The next `count` pending tokens of a sequence, and behind them, where that is its last token,
/// the first `num_drafts` of its draft.
struct PlannedRows {
  Sequence* sequence = nullptr;
  std::int32_t count = 0;
  std::int32_t num_drafts = 0;
};

/// One decode call.
struct PlannedMicroBatch {
  std::vector<PlannedRows> rows;
  std::vector<SeqId> filler_slots;  ///< idle slots that get a dummy row each, forgotten afterwards
  std::int32_t num_extra_outputs = 0;  ///< rows to give logits that nobody asks for
};

struct StepPlan {
  std::vector<Sequence*> preemptions;
  std::vector<Sequence*> parked;  ///< those of them whose cells stay, as a cached prefix
  std::vector<SeqId> evictions;   ///< cached slots to empty
  std::vector<Admission> admissions;
  std::vector<PlannedMicroBatch> micro_batches;
  std::int32_t num_slot_preemptions = 0;  ///< of `preemptions`, for their slot and not for cells

  [[nodiscard]] bool empty() const {
    return preemptions.empty() && evictions.empty() && admissions.empty() && micro_batches.empty();
  }
};

}  // namespace batchcore
