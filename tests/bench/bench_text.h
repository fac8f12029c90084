// Text as a tokenizer would cut it, for benchmarks of what handles it piece by piece.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/utf8.h"

namespace batchcore::bench {

/// Two lines of prose, half of the characters outside ASCII where `multibyte`.
inline std::string prose(bool multibyte) {
  return multibyte ? "Der Zug fährt über die Brücke; 列車は橋を渡り、山の向こうの町へ急ぐ。 "
                     "Поезд идёт через мост, и город виден вдали — größer denn je.\n"
                   : "The train crosses the bridge before dawn, and by the time that the others "
                     "wake up it has left the hills <behind> it.\nNobody said a word # not one.\n";
}

/// `text` in pieces of 3 to 5 bytes or, where a character is cut, a few more: an English token has
/// about four.
inline std::vector<std::string> pieces_of(std::string_view text) {
  std::vector<std::string> pieces;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = std::min(at + 3 + pieces.size() % 3, text.size());
    while (end < text.size() && is_utf8_continuation(text[end])) ++end;
    pieces.emplace_back(text.substr(at, end - at));
    at = end;
  }
  return pieces;
}

inline std::int64_t num_bytes(const std::vector<std::string>& pieces) {
  std::size_t sum = 0;
  for (const std::string& piece : pieces) sum += piece.size();
  return static_cast<std::int64_t>(sum);
}

}  // namespace batchcore::bench
