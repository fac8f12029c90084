// Which cached prefix to give up. Pure policy.
#pragma once

#include <span>

#include "core/scheduler_state.h"
#include "core/types.h"

namespace batchcore {

/// The cached slot that is worth least and in neither of `keep` and `gone`, or -1. Worth is the
/// time to compute its own cells again, per cell, over the steps since it last served: among
/// prefixes of one age the deeper ones stay, whose tokens attend to more. Pinned ones only where
/// `even_pinned`, and then last.
[[nodiscard]] SeqId least_worth(const SchedulerState& state, std::span<const SeqId> keep,
                                std::span<const SeqId> gone, bool even_pinned);

}  // namespace batchcore
