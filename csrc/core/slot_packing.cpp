#include "core/slot_packing.h"

#include <algorithm>
#include <vector>

namespace batchcore {
namespace {

// Steps that a move is taken to serve at most: by then other sequences have ended, too.
constexpr std::int32_t kHorizon = 32;

}  // namespace

std::optional<SlotSwap> choose_swap(const SchedulerState& state) {
  if (state.info.layout != KvLayout::kStreams || !state.waiting.empty() || state.running.empty()) {
    return std::nullopt;
  }
  std::vector<bool> is_busy(static_cast<std::size_t>(state.info.num_slots), false);
  for (const Sequence* sequence : state.running) {
    is_busy[static_cast<std::size_t>(sequence->slot)] = true;
  }
  const auto first = std::find(is_busy.begin(), is_busy.end(), true);
  const auto gap = std::find(first, is_busy.end(), false);
  const auto highest =
      std::max_element(state.running.begin(), state.running.end(),
                       [](const Sequence* a, const Sequence* b) { return a->slot < b->slot; });
  const auto to = static_cast<SeqId>(gap - is_busy.begin());
  Sequence* sequence = *highest;
  if (to > sequence->slot || !sequence->is_decoding()) return std::nullopt;
  // A saved state has only the window before its end: less than what the slot could serve.
  const bool is_windowed = state.info.memory == MemoryKind::kSlidingWindow;
  const std::int32_t longest = std::max(state.kv.length(sequence->slot), state.kv.length(to));
  if (is_windowed && longest > state.info.window) return std::nullopt;
  return SlotSwap{sequence, to};
}

bool swap_pays(const Sequence& sequence, std::size_t bytes, const StepCost& cost,
               const CopySpeed& copy) {
  if (!cost.is_ready()) return false;
  const std::int32_t steps = std::min(sequence.max_tokens_total - sequence.num_tokens(), kHorizon);
  return 2 * copy.seconds(bytes) < steps * cost.coefficients()[2];
}

}  // namespace batchcore
