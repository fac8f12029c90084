// Bytes into whole UTF-8 characters, piece by piece. One per sequence; one thread at a time.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace batchcore {

/// U+FFFD, what stands for bytes that are no character.
inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

/// Decodes a stream of bytes. Invalid bytes become U+FFFD, one for each maximal part of a
/// character, as the Unicode standard recommends and Python's errors="replace" does.
class Utf8Stream {
 public:
  /// Appends the characters that `bytes` completes; holds back at most 3 bytes of an unfinished
  /// one.
  void push(std::string_view bytes, std::string& out);

  /// The stream ends: what was held back becomes one U+FFFD.
  void finish(std::string& out);

 private:
  char held_[3] = {};
  std::size_t num_held_ = 0;
};

/// Whether `byte` can't be the first one of a character.
[[nodiscard]] inline bool is_utf8_continuation(char byte) {
  return (static_cast<unsigned char>(byte) & 0xC0U) == 0x80U;
}

}  // namespace batchcore
