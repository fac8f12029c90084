// What to do with the cells of a sequence that has to give way.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/step_cost.h"

namespace batchcore {

enum class PreemptionMode {
  kAuto,       ///< whichever is predicted to take less time
  kRecompute,  ///< forget the cells and compute them again
  kSave,       ///< copy them to host memory and back
};

/// Copies to and from host memory, learnt while the engine runs.
class CopySpeed {
 public:
  void observe(std::size_t bytes, double seconds) {
    if (seconds > 0.0) {
      bytes_per_second_ += 0.2 * (static_cast<double>(bytes) / seconds - bytes_per_second_);
    }
  }
  [[nodiscard]] double seconds(std::size_t bytes) const {
    return static_cast<double>(bytes) / bytes_per_second_;
  }

 private:
  double bytes_per_second_ =
      1e9;  // until measured: slower than any memory, so errs towards computing
};

/// True where copying `bytes` out and back is predicted to take less time than computing
/// `num_tokens` again.
[[nodiscard]] inline bool saving_pays(PreemptionMode mode, std::int32_t num_tokens,
                                      std::size_t bytes, const StepCost& cost,
                                      const CopySpeed& copy) {
  if (mode != PreemptionMode::kAuto) return mode == PreemptionMode::kSave;
  if (!cost.is_ready()) return false;
  return 2 * copy.seconds(bytes) < num_tokens * cost.seconds_per_prefill_token();
}

}  // namespace batchcore
