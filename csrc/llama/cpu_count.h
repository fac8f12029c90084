#pragma once

#include <cstdint>

namespace batchcore {

/// Physical cores that this process may use: its affinity mask and, on Linux, the CPU quota of its
/// container are respected, and two hyperthreads count once (they share the vector units that
/// matrix products keep busy). At least 1. Any thread.
std::int32_t usable_cores();

}  // namespace batchcore
