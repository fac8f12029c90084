// Finds stop strings in text that comes piece by piece. One per sequence; one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace batchcore {

/// Holds text back as long as it may be the beginning of a stop string. The match that ends first
/// wins; of those that end at the same byte, the longest (which began first). Linear in the text.
/// Copies share the automaton, so completions of one request can copy one matcher.
class StopMatcher {
 public:
  /// Empty strings never match.
  explicit StopMatcher(const std::vector<std::string>& stops);

  /// Appends to `safe` what can't be part of a stop string any more. `text` is whole UTF-8
  /// characters, and so is what is appended. Returns the index of the stop string that matched;
  /// it and what follows are dropped, now and in later calls, which return the same index.
  std::optional<std::size_t> push(std::string_view text, std::string& safe);

  /// No text follows: appends what was held back. Nothing after a match.
  void finish(std::string& safe);

 private:
  class Automaton;

  void release(std::size_t count, std::string& safe);

  std::shared_ptr<const Automaton> automaton_;  // null without stop strings
  std::int32_t state_ = 0;
  std::string held_;  // from held_begin_ on: what was pushed and not yet appended
  std::size_t held_begin_ = 0;
  std::optional<std::size_t> matched_;
};

}  // namespace batchcore
