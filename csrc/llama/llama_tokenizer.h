// Text to tokens and back, exact to the byte. llama.cpp's own pair is not: it loses U+2581 in
// SentencePiece vocabularies, replaces invalid UTF-8 in byte-level ones, and may drop spaces.
// Immutable; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/types.h"

struct llama_vocab;

namespace batchcore {

class LlamaTokenizer {
 public:
  /// `vocab` must outlive this and must not be of llama.cpp's type "none".
  explicit LlamaTokenizer(const llama_vocab* vocab);

  /// Text (any bytes, NUL included) to tokens. `add_special` adds what the model wants around a
  /// text (BOS, EOS). With `parse_special`, names of control tokens in the text become those
  /// tokens. Without it, decode(encode(text)) == text in every vocabulary that has a token for each
  /// byte; where llama.cpp's tokens already have that property, they are what is returned.
  [[nodiscard]] std::vector<Token> encode(std::string_view text, bool add_special,
                                          bool parse_special) const;

  /// Tokens to bytes. With `skip_special`, control tokens have no text. Throws InvalidRequestError
  /// for a token outside of the vocabulary.
  [[nodiscard]] std::string decode(std::span<const Token> tokens, bool skip_special) const;

  /// Bytes of one token; the name of a control token only where `special`. Same error.
  [[nodiscard]] std::string piece(Token token, bool special) const;

 private:
  using ByteTokens = std::array<Token, 256>;

  [[nodiscard]] std::vector<Token> encode_raw(std::string_view text, bool add_special,
                                              bool parse_special) const;
  [[nodiscard]] std::string with_valid_utf8(std::string_view text) const;
  [[nodiscard]] bool is_lossy(std::string_view text) const;
  [[nodiscard]] std::size_t lossy_unit(std::string_view text) const;
  [[nodiscard]] bool encode_exact(std::string_view text, std::vector<Token>& tokens) const;
  [[nodiscard]] bool encode_segment(std::string_view text, bool first,
                                    std::vector<Token>& tokens) const;
  [[nodiscard]] bool encode_inside(std::string_view text, std::vector<Token>& tokens) const;
  [[nodiscard]] bool encode_bytes(std::string_view text, std::vector<Token>& tokens) const;
  [[nodiscard]] std::size_t match(std::string_view text, bool first,
                                  std::vector<Token>& tokens) const;
  [[nodiscard]] const ByteTokens& byte_tokens() const;

  const llama_vocab* vocab_;
  // What encode_raw() does to a text, found out by trying.
  bool adds_space_ = false;       // a text begins with a space that is not in it
  bool loses_lower_bar_ = false;  // U+2581 comes back as a space
  bool loses_invalid_ = false;    // a byte that is not UTF-8 comes back as U+FFFD
  mutable std::once_flag byte_tokens_once_;
  mutable ByteTokens byte_tokens_{};
};

}  // namespace batchcore
