// Which kernels this CPU runs. Any thread.
#pragma once

#include "kernels/kernel_set.h"

namespace batchcore::kernels {

/// The fastest set that this CPU reports and has been seen to execute, or null where there is none.
/// The environment variable BATCHCORE_KERNELS names a set instead, or "ggml" for none; it is read
/// once.
[[nodiscard]] const KernelSet* best_kernels();

/// All sets that this CPU executes, fastest first; a null pointer ends the list. For tests.
[[nodiscard]] const KernelSet* const* usable_kernels();

}  // namespace batchcore::kernels
