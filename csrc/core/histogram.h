// Counts of durations (or other amounts) in buckets of bounded relative width, small enough to be
// copied with every snapshot. Not thread-safe.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace batchcore {

/// Eight equal buckets per power of two from 15 microseconds to two hours (as HdrHistogram divides
/// them): a quantile is off by at most a sixteenth of its value. What lies outside is counted at
/// the ends.
class LogHistogram {
 public:
  static constexpr int kMinExponent = -16;
  static constexpr int kMaxExponent = 13;
  static constexpr int kPerOctave = 8;
  static constexpr std::size_t kNumBuckets =
      static_cast<std::size_t>((kMaxExponent - kMinExponent) * kPerOctave);

  void record(double seconds) {
    counts_[bucket_of(seconds)] += 1;
    count_ += 1;
    sum_ += std::max(seconds, 0.0);
  }

  [[nodiscard]] std::int64_t count() const { return count_; }
  [[nodiscard]] double sum() const { return sum_; }
  [[nodiscard]] std::int64_t count_in(std::size_t bucket) const { return counts_[bucket]; }

  /// Bucket b holds the values in [lower_bound(b), lower_bound(b + 1)).
  [[nodiscard]] static double lower_bound(std::size_t bucket) {
    const auto octave = static_cast<int>(bucket) / kPerOctave;
    const auto part = static_cast<int>(bucket) % kPerOctave;
    return std::ldexp(1.0 + static_cast<double>(part) / kPerOctave, kMinExponent + octave);
  }

  /// The middle of the bucket that holds the value at `share` (0..1) of all, 0 where there is none.
  [[nodiscard]] double quantile(double share) const {
    if (count_ == 0) return 0.0;
    const auto rank = static_cast<std::int64_t>(
        std::ceil(std::clamp(share, 0.0, 1.0) * static_cast<double>(count_)));
    std::int64_t before = 0;
    std::size_t bucket = 0;
    while (bucket + 1 < kNumBuckets &&
           (before += counts_[bucket]) < std::max<std::int64_t>(rank, 1))
      ++bucket;
    return (lower_bound(bucket) + lower_bound(bucket + 1)) / 2;
  }

 private:
  static std::size_t bucket_of(double seconds) {
    if (!(seconds >= std::ldexp(1.0, kMinExponent))) return 0;  // NaN too
    if (seconds >= std::ldexp(1.0, kMaxExponent)) return kNumBuckets - 1;
    int exponent = 0;
    const double mantissa = std::frexp(seconds, &exponent);  // in [0.5, 1)
    const int part = static_cast<int>((mantissa - 0.5) * 2 * kPerOctave);
    return static_cast<std::size_t>((exponent - 1 - kMinExponent) * kPerOctave + part);
  }

  std::array<std::int64_t, kNumBuckets> counts_{};
  std::int64_t count_ = 0;
  double sum_ = 0.0;
};

}  // namespace batchcore
