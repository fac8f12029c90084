// A row of logits with a few of them replaced, read block by block and never copied as a whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"
#include "engine/logit_kernels.h"

namespace batchcore {

/// A token with the logit that it has in place of the model's.
struct TokenLogit {
  Token token = -1;
  float logit = 0.0F;
};

/// Room for one block that differs from the model's.
struct alignas(64) BlockBuffer {
  float values[kLogitBlock];
};

/// Neither logits nor overrides are owned. One thread at a time, as it writes to its buffer.
class LogitView {
 public:
  /// `overrides` ascend by token without repetition, all in [0, size); `starts` is scratch.
  LogitView(const float* logits, std::size_t size, std::span<const TokenLogit> overrides,
            std::vector<std::uint32_t>& starts, BlockBuffer& buffer)
      : logits_(logits), size_(size), overrides_(overrides), starts_(starts), buffer_(buffer) {
    const std::size_t blocks = num_blocks();
    starts_.resize(blocks + 1);
    std::uint32_t next = 0;
    for (std::size_t b = 0; b < blocks; ++b) {
      starts_[b] = next;
      const std::size_t end = (b + 1) * kLogitBlock;
      while (next < overrides_.size() && static_cast<std::size_t>(overrides_[next].token) < end) {
        ++next;
      }
    }
    starts_[blocks] = next;
  }

  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::size_t num_blocks() const { return (size_ + kLogitBlock - 1) / kLogitBlock; }

  /// kLogitBlock values, the last block filled up with kNoLogit; valid until the next call.
  [[nodiscard]] const float* block(std::size_t index) const {
    const float* from = logits_ + index * kLogitBlock;
    if (is_plain(index)) return from;
    const std::size_t begin = index * kLogitBlock;
    const std::size_t count = std::min(kLogitBlock, size_ - begin);
    std::copy_n(from, count, buffer_.values);
    std::fill(buffer_.values + count, buffer_.values + kLogitBlock, kNoLogit);
    for (std::uint32_t i = starts_[index]; i < starts_[index + 1]; ++i) {
      buffer_.values[static_cast<std::size_t>(overrides_[i].token) - begin] = overrides_[i].logit;
    }
    return buffer_.values;
  }

  /// Calls `visit(values, first_block, num_blocks)` over all blocks in order, many at a time where
  /// nothing is replaced.
  template <typename Visit>
  void for_each_run(Visit visit) const {
    const std::size_t blocks = num_blocks();
    for (std::size_t b = 0; b < blocks;) {
      std::size_t end = b;
      while (end < blocks && is_plain(end)) ++end;
      if (end > b) {
        visit(logits_ + b * kLogitBlock, b, end - b);
        b = end;
      } else {
        visit(block(b), b, std::size_t{1});
        ++b;
      }
    }
  }

 private:
  [[nodiscard]] bool is_plain(std::size_t index) const {
    return starts_[index] == starts_[index + 1] && (index + 1) * kLogitBlock <= size_;
  }

  const float* logits_;
  std::size_t size_;
  std::span<const TokenLogit> overrides_;
  std::vector<std::uint32_t>& starts_;  // overrides of block b: [starts_[b], starts_[b + 1])
  BlockBuffer& buffer_;
};

}  // namespace batchcore
