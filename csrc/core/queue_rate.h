// How fast requests leave the waiting queue, to say how long one that comes now would wait. Pure.
#pragma once

#include <cmath>
#include <cstdint>

namespace batchcore {

class QueueRate {
 public:
  /// In `seconds` in which somebody waited throughout, requests with as many prompt tokens were
  /// admitted.
  void observe(double seconds, std::int64_t num_requests, std::int64_t num_tokens) {
    if (seconds <= 0.0) return;
    const double kept = std::exp(-seconds / kMemoryS);
    seconds_ = seconds_ * kept + seconds;
    requests_ = requests_ * kept + static_cast<double>(num_requests);
    tokens_ = tokens_ * kept + static_cast<double>(num_tokens);
    num_seen_ += num_requests;
  }

  [[nodiscard]] bool is_known() const { return num_seen_ >= kMinSeen && tokens_ > 0.0; }
  [[nodiscard]] double requests_per_s() const { return requests_ / seconds_; }
  [[nodiscard]] double tokens_per_s() const { return tokens_ / seconds_; }

 private:
  static constexpr double kMemoryS = 10.0;
  static constexpr std::int64_t kMinSeen = 4;
  double seconds_ = 0.0;
  double requests_ = 0.0;
  double tokens_ = 0.0;
  std::int64_t num_seen_ = 0;
};

}  // namespace batchcore
