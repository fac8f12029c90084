// A static batch: requests that start together and decode in lock-step, until the longest one ends.
// Slots of those that ended before stand idle; that is what continuous batching saves, and what is
// counted here. Engine thread only.
#pragma once

#include <cstdint>

namespace batchcore {

struct StaticBatch {
  std::int32_t size = 0;         ///< sequences that belong to it
  std::int32_t num_started = 0;  ///< those whose prompt is computed, or that ended before
  std::int32_t num_ended = 0;

  /// Nobody decodes until every prompt is computed.
  [[nodiscard]] bool is_prefilling() const { return num_started < size; }
};

}  // namespace batchcore
