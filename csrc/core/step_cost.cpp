#include "core/step_cost.h"

#include <algorithm>

namespace batchcore {
namespace {

constexpr double kForgetting = 0.98;
// A long run of steps of one shape excites one direction only; without a bound the others' variance
// grows until the first different step throws the fit anywhere.
constexpr double kMaxTrace = 4e2;
// Features are scaled to about 1 so that one covariance fits them all.
constexpr std::array<double, 4> kScale{1.0, 1.0 / 128, 1.0 / 16, 1.0 / 4096};

}  // namespace

StepCost::Vector StepCost::features(const StepWork& work) {
  return {kScale[0], work.prefill_tokens * kScale[1], work.decode_rows * kScale[2],
          static_cast<double>(work.kv_tokens) * kScale[3]};
}

void StepCost::observe(const StepWork& work, double seconds) {
  if (work.prefill_tokens > 0) num_prefill_ += 1;
  if (work.decode_rows > 0) num_decode_ += 1;
  const Vector x = features(work);
  Vector gain{};
  double denominator = kForgetting;
  for (std::size_t i = 0; i < 4; ++i) {
    for (std::size_t j = 0; j < 4; ++j) gain[i] += covariance_[i][j] * x[j];
  }
  double predicted = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    denominator += x[i] * gain[i];
    predicted += theta_[i] * x[i];
  }
  const double error = seconds - predicted;
  double trace = 0;
  for (std::size_t i = 0; i < 4; ++i) trace += covariance_[i][i];
  const double forgetting = trace < kMaxTrace ? kForgetting : 1.0;
  Vector projected = gain;
  for (std::size_t i = 0; i < 4; ++i) {
    theta_[i] += gain[i] / denominator * error;
    for (std::size_t j = 0; j < 4; ++j) {
      covariance_[i][j] = (covariance_[i][j] - gain[i] * projected[j] / denominator) / forgetting;
    }
  }
}

std::array<double, 4> StepCost::coefficients() const {
  std::array<double, 4> out{};
  for (std::size_t i = 0; i < 4; ++i) out[i] = std::max(theta_[i], 0.0) * kScale[i];
  return out;
}

double StepCost::seconds(const StepWork& work) const {
  const std::array<double, 4> k = coefficients();
  return k[0] + k[1] * work.prefill_tokens + k[2] * work.decode_rows +
         k[3] * static_cast<double>(work.kv_tokens);
}

double StepCost::seconds_per_prefill_token() const { return coefficients()[1]; }

}  // namespace batchcore
