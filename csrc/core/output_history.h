// How long outputs of this engine have been lately, to admit by what requests are likely to need
// and not by the most that they may ask for (after Past-Future scheduling, arXiv 2507.10150).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace batchcore {

class OutputHistory {
 public:
  void record(std::int32_t num_generated) {
    const auto end = sorted_.begin() + static_cast<std::ptrdiff_t>(size_);
    if (size_ == kSize) {
      const auto oldest = std::lower_bound(sorted_.begin(), end, lengths_[next_]);
      std::move(oldest + 1, end, oldest);
      size_ -= 1;
    }
    const auto last = sorted_.begin() + static_cast<std::ptrdiff_t>(size_);
    const auto place = std::upper_bound(sorted_.begin(), last, num_generated);
    std::move_backward(place, last, last + 1);
    *place = num_generated;
    size_ += 1;
    lengths_[next_] = num_generated;
    next_ = (next_ + 1) % kSize;
  }

  /// Output tokens that a sequence with `generated` of them is expected to have in the end, at most
  /// `max_tokens`: the upper quartile of recent outputs that got further than it. Where the past
  /// says nothing, `guess`, or twice what it has already; a wrong guess costs a preemption, not a
  /// failure.
  [[nodiscard]] std::int32_t expected(std::int32_t generated, std::int32_t max_tokens,
                                      std::int32_t guess) const {
    const auto end = sorted_.begin() + static_cast<std::ptrdiff_t>(size_);
    const auto longer = std::upper_bound(sorted_.begin(), end, generated);
    if (size_ < kMinSize || longer == end) {
      return static_cast<std::int32_t>(
          std::min<std::int64_t>(max_tokens, std::max<std::int64_t>(guess, 2LL * generated)));
    }
    return std::min(*(longer + (end - longer) * 3 / 4), max_tokens);
  }

 private:
  static constexpr std::size_t kSize = 128;
  static constexpr std::size_t kMinSize = 16;
  std::array<std::int32_t, kSize> lengths_{};  // a ring, for which is the oldest
  std::array<std::int32_t, kSize> sorted_{};   // the same: a plan asks for every sequence
  std::size_t next_ = 0;
  std::size_t size_ = 0;
};

}  // namespace batchcore
