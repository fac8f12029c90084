// How long a step takes, learnt while the engine runs:
//   seconds = a + b * prefill tokens + c * decode rows + d * KV tokens attended to
// by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace batchcore {

/// What a step computes.
struct StepWork {
  std::int32_t prefill_tokens = 0;
  std::int32_t decode_rows = 0;
  std::int64_t kv_tokens = 0;  ///< summed over the rows of the step
};

class StepCost {
 public:
  void observe(const StepWork& work, double seconds);

  /// True once enough steps of different shapes were seen for the fit to mean something.
  [[nodiscard]] bool is_ready() const { return num_prefill_ >= 4 && num_decode_ >= 4; }

  /// Predicted seconds of a step.
  [[nodiscard]] double seconds(const StepWork& work) const;

  /// Seconds that one more prefill token adds.
  [[nodiscard]] double seconds_per_prefill_token() const;

  /// Whether `rows` more decode rows, which attend to nothing, take no longer than a call of its
  /// own; `num_prompt_tokens` of them would have to be computed in any case.
  [[nodiscard]] bool is_cheaper_than_a_call(std::int32_t rows,
                                            std::int32_t num_prompt_tokens = 0) const {
    const auto [call, prompt_token, row, attention] = coefficients();
    return rows * row - num_prompt_tokens * prompt_token <= call;
  }

  /// [a, b, c, d] in seconds, for stats.
  [[nodiscard]] std::array<double, 4> coefficients() const;

 private:
  using Vector = std::array<double, 4>;
  static Vector features(const StepWork& work);

  Vector theta_{};
  std::array<Vector, 4> covariance_{
      {{1e2, 0, 0, 0}, {0, 1e2, 0, 0}, {0, 0, 1e2, 0}, {0, 0, 0, 1e2}}};
  std::int64_t num_prefill_ = 0;
  std::int64_t num_decode_ = 0;
};

}  // namespace batchcore
