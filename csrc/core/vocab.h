// The part of a vocabulary that the engine needs per token: pieces as bytes and the tokens that end
// a generation. Immutable once built, so any thread may read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/types.h"

namespace batchcore {

class Vocab {
 public:
  /// Appends the next token's piece (raw bytes; control tokens have none).
  void add_piece(std::string_view piece) {
    bytes_.append(piece);
    ends_.push_back(bytes_.size());
  }
  void add_end_of_generation(Token token) { end_of_generation_.push_back(token); }

  [[nodiscard]] std::int32_t size() const { return static_cast<std::int32_t>(ends_.size()); }

  /// Raw bytes of `token`, which may be part of a UTF-8 character. `token` must be in the
  /// vocabulary.
  [[nodiscard]] std::string_view piece(Token token) const {
    const auto index = static_cast<std::size_t>(token);
    const std::size_t begin = index == 0 ? 0 : ends_[index - 1];
    return std::string_view(bytes_).substr(begin, ends_[index] - begin);
  }

  /// Tokens that end a generation (end of sequence, end of turn, ...), ascending.
  [[nodiscard]] std::span<const Token> end_of_generation() const { return end_of_generation_; }

 private:
  std::string bytes_;
  std::vector<std::size_t> ends_;
  std::vector<Token> end_of_generation_;
};

}  // namespace batchcore
