// Guesses the next tokens of a sequence from its own: where its last tokens have occurred before,
// what followed there may follow again (prompt lookup decoding).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"

namespace batchcore {

/// Tokens that may come next, and how many of the last tokens say so.
struct Draft {
  std::vector<Token> tokens;
  std::int32_t match_length = 0;

  void clear() {
    tokens.clear();
    match_length = 0;
  }
};

/// Where runs of 2 to 5 tokens of one sequence last ended. Takes in each token once; a look-up is
/// four probes. At most 512 KiB: beyond some ten thousand tokens runs that are long past may be
/// forgotten.
class NgramIndex {
 public:
  static constexpr std::int32_t kShortest = 2;
  static constexpr std::int32_t kLongest = 5;

  /// Up to `most` tokens that followed the latest earlier occurrence of the longest run that
  /// `tokens` end with. Where the two overlap, what was drafted goes on in its turn, so that a loop
  /// is drafted as far as is wanted. `tokens` must begin with those of the call before.
  void propose(std::span<const Token> tokens, std::int32_t most, Draft& draft);

 private:
  void take_in(std::span<const Token> tokens, std::size_t until);
  void resize(std::size_t num_tokens);
  [[nodiscard]] std::int32_t& ends_of(std::uint64_t hash) {
    return ends_[(hash * 0x9E3779B97F4A7C15ULL) >> shift_];
  }

  std::vector<std::int32_t> ends_;  // by hash of a run: index behind it, 0 where there is none
  int shift_ = 0;                   // 64 - log2 of the size
  std::size_t num_taken_ = 0;       // runs that end at or before it are known
};

}  // namespace batchcore
