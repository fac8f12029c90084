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
    lengths_[next_] = num_generated;
    next_ = (next_ + 1) % lengths_.size();
    size_ = std::min(size_ + 1, lengths_.size());
  }

  /// Output tokens that a sequence with `generated` of them is expected to have in the end, at most
  /// `max_tokens`: the upper quartile of recent outputs that got further than it. Where the past
  /// says nothing, `guess`, or twice what it has already; a wrong guess costs a preemption, not a
  /// failure.
  [[nodiscard]] std::int32_t expected(std::int32_t generated, std::int32_t max_tokens,
                                      std::int32_t guess) const {
    std::array<std::int32_t, kSize> longer;
    std::size_t count = 0;
    for (std::size_t i = 0; i < size_; ++i) {
      if (lengths_[i] > generated) longer[count++] = lengths_[i];
    }
    if (size_ < kMinSize || count == 0) {
      return static_cast<std::int32_t>(
          std::min<std::int64_t>(max_tokens, std::max<std::int64_t>(guess, 2LL * generated)));
    }
    const auto quartile = longer.begin() + static_cast<std::ptrdiff_t>(count * 3 / 4);
    std::nth_element(longer.begin(), quartile, longer.begin() + static_cast<std::ptrdiff_t>(count));
    return std::min(*quartile, max_tokens);
  }

 private:
  static constexpr std::size_t kSize = 128;
  static constexpr std::size_t kMinSize = 16;
  std::array<std::int32_t, kSize> lengths_{};
  std::size_t next_ = 0;
  std::size_t size_ = 0;
};

}  // namespace batchcore
