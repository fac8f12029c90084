#include "core/batch_size.h"

#include <algorithm>
#include <cmath>

namespace batchcore {
namespace {

constexpr double kThroughputShare = 0.95;
constexpr double kShrink = 0.75;

}  // namespace

std::int32_t throughput_knee(const std::array<double, 4>& cost, double kv_per_row,
                             std::int32_t max_num_seqs) {
  const double per_call = cost[0];
  if (per_call <= 0.0) return max_num_seqs;
  // n / (a + c n) >= s N / (a + c N), solved for n.
  const double per_row = cost[2] + cost[3] * kv_per_row;
  const double most = max_num_seqs;
  const double knee =
      kThroughputShare * most * per_call / (per_call + (1.0 - kThroughputShare) * per_row * most);
  // A whisker above a whole number is that number.
  return std::clamp(static_cast<std::int32_t>(std::ceil(knee - 1e-9)), 1, max_num_seqs);
}

void BatchSizeController::observe(double itl_s, std::int32_t num_running) {
  if (target_itl_s_ <= 0.0) return;
  // Sequences that were admitted before the limit fell say nothing about the limit.
  if (num_running > limit()) {
    size_ = 0;
    most_running_ = 0;
    return;
  }
  window_[size_++] = itl_s;
  most_running_ = std::max(most_running_, num_running);
  if (size_ == kWindow) decide();
}

void BatchSizeController::decide() {
  const auto at = window_.begin() + kWindow * 95 / 100;
  std::nth_element(window_.begin(), at, window_.end());
  if (*at > target_itl_s_) {
    // Where fewer ran than might have, it is they who were too many.
    const std::int32_t tried = std::min(limit(), most_running_);
    const auto next = std::max(static_cast<std::int32_t>(tried * kShrink), 1);
    num_decreases_ += next < latency_limit_ ? 1 : 0;
    latency_limit_ = std::min(latency_limit_, next);
  } else if (*at < kGrowsBelow * target_itl_s_ && most_running_ >= latency_limit_ &&
             latency_limit_ < max_num_seqs_) {
    latency_limit_ += 1;
    num_increases_ += 1;
  }
  size_ = 0;
  most_running_ = 0;
}

}  // namespace batchcore
