#include "core/eviction.h"

#include <algorithm>
#include <array>
#include <cstddef>

namespace batchcore {
namespace {

double worth(const SchedulerState& state, SeqId slot) {
  const std::int32_t length = state.kv.length(slot);
  const std::int32_t own = state.kv.cells_freed_by(std::span(&slot, 1));
  // Nothing is lost with it: other slots hold the same cells.
  if (own == 0) return 0.0;
  double per_cell = 1.0;
  if (state.cost.is_ready()) {
    const std::array<double, 4> k = state.cost.coefficients();
    per_cell = k[1] + k[3] * (length - own / 2.0);
  }
  const auto age = static_cast<double>(
      state.step - std::min(state.last_used[static_cast<std::size_t>(slot)], state.step) + 1);
  return per_cell / age;
}

}  // namespace

SeqId least_worth(const SchedulerState& state, std::span<const SeqId> keep,
                  std::span<const SeqId> gone, bool even_pinned) {
  const auto is_in = [](std::span<const SeqId> slots, SeqId slot) {
    return std::find(slots.begin(), slots.end(), slot) != slots.end();
  };
  SeqId best = -1;
  bool best_is_pinned = true;
  double best_worth = 0.0;
  for (SeqId slot = 0; slot < state.info.num_slots; ++slot) {
    const bool is_pinned = state.pinned[static_cast<std::size_t>(slot)];
    if (state.kv.state(slot) != KvTree::SlotState::kCached || (is_pinned && !even_pinned)) continue;
    if (is_in(keep, slot) || is_in(gone, slot)) continue;
    const double value = worth(state, slot);
    if (best < 0 || (best_is_pinned && !is_pinned) ||
        (best_is_pinned == is_pinned && value < best_worth)) {
      best = slot;
      best_is_pinned = is_pinned;
      best_worth = value;
    }
  }
  return best;
}

}  // namespace batchcore
