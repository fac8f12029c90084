// In streams, llama.cpp cuts a decode call wherever the ids of its sequences have a gap, so gaps
// are paid for in every step: by a dummy row for each idle slot, or by one more pass over the
// weights. Where a batch drains, it is cheaper to move a sequence once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/preemption.h"
#include "core/scheduler_state.h"
#include "core/sequence.h"

namespace batchcore {

struct SlotSwap {
  Sequence* sequence = nullptr;  ///< in the highest slot in use
  SeqId to = -1;                 ///< idle, between slots in use
};

/// The sequence whose move would make the slots in use denser, and where to. None while somebody
/// waits, who will fill the gap, or where the memory can't move what a slot holds without loss.
[[nodiscard]] std::optional<SlotSwap> choose_swap(const SchedulerState& state);

/// Whether copying `bytes` out and back costs less than the rows that the move saves.
[[nodiscard]] bool swap_pays(const Sequence& sequence, std::size_t bytes, const StepCost& cost,
                             const CopySpeed& copy);

}  // namespace batchcore
