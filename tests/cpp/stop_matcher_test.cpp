#include "engine/stop_matcher.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/utf8.h"

namespace batchcore {
namespace {

using Stops = std::vector<std::string>;

struct Result {
  std::string text;
  std::optional<std::size_t> match;
  bool operator==(const Result&) const = default;
};

Result feed(StopMatcher matcher, const std::vector<std::string_view>& pieces) {
  Result result;
  for (const std::string_view piece : pieces) result.match = matcher.push(piece, result.text);
  matcher.finish(result.text);
  return result;
}

// Earliest end, then longest, then lowest index.
Result reference(const Stops& stops, const std::string& text) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::optional<std::size_t> best;
    for (std::size_t i = 0; i < stops.size(); ++i) {
      if (stops[i].empty() || !std::string_view(text).substr(0, end).ends_with(stops[i])) continue;
      if (!best || stops[i].size() > stops[*best].size()) best = i;
    }
    if (best) return {text.substr(0, end - stops[*best].size()), best};
  }
  return {text, std::nullopt};
}

// The longest end of `text` that begins a stop string.
std::size_t must_hold(const Stops& stops, std::string_view text) {
  std::size_t longest = 0;
  for (const std::string& stop : stops) {
    for (std::size_t n = 1; n < stop.size() && n <= text.size(); ++n) {
      if (text.ends_with(std::string_view(stop).substr(0, n))) longest = std::max(longest, n);
    }
  }
  return longest;
}

TEST_CASE("stop matcher: without stop strings all text passes at once") {
  for (const Stops& stops : {Stops{}, Stops{""}}) {
    StopMatcher matcher(stops);
    std::string safe;
    CHECK_FALSE(matcher.push("anything", safe).has_value());
    CHECK(safe == "anything");
  }
}

TEST_CASE("stop matcher: text and stop string are cut at the match") {
  StopMatcher matcher({"###", "END"});
  std::string safe;
  CHECK_FALSE(matcher.push("one #", safe).has_value());
  CHECK(safe == "one ");
  CHECK_FALSE(matcher.push("# two E", safe).has_value());
  CHECK(safe == "one ## two ");
  CHECK(matcher.push("ND three ###", safe) == 1U);
  CHECK(safe == "one ## two ");
  CHECK(matcher.push("more", safe) == 1U);
  matcher.finish(safe);
  CHECK(safe == "one ## two ");
}

TEST_CASE("stop matcher: the earliest end wins, then the longest, then the lowest index") {
  CHECK(feed(StopMatcher({"abcd", "bc"}), {"xabcd"}) == Result{"xa", 1});
  CHECK(feed(StopMatcher({"c", "abc", "bc", "abc"}), {"xabcd"}) == Result{"x", 1});
  CHECK(feed(StopMatcher({"abab", "b"}), {"aaab"}) == Result{"aaa", 1});
  CHECK(feed(StopMatcher({"aab"}), {"aaaab"}) == Result{"aa", 0});
}

TEST_CASE("stop matcher: what was held back comes out at the end") {
  StopMatcher matcher({"stop!"});
  std::string safe;
  CHECK_FALSE(matcher.push("non-stop", safe).has_value());
  CHECK(safe == "non-");
  matcher.finish(safe);
  CHECK(safe == "non-stop");
}

TEST_CASE("stop matcher: held-back text starts at a character") {
  // The stop string begins in the middle of the character, as no caller may ask but a bug could.
  StopMatcher matcher({"\x82\xAC!"});
  std::string safe;
  CHECK_FALSE(matcher.push("a\xE2\x82\xAC", safe).has_value());
  CHECK(safe == "a");
  CHECK_FALSE(matcher.push("b", safe).has_value());
  CHECK(safe ==
        "a\xE2\x82\xAC"
        "b");
  CHECK(matcher.push("\xE2\x82\xAC!", safe) == 0U);
  CHECK(safe ==
        "a\xE2\x82\xAC"
        "b");
}

TEST_CASE("stop matcher: copies go their own way") {
  StopMatcher first({"ab"});
  std::string first_safe;
  first.push("xa", first_safe);
  StopMatcher second = first;
  std::string second_safe;
  CHECK(first.push("b", first_safe) == 0U);
  CHECK_FALSE(second.push("c", second_safe).has_value());
  CHECK(first_safe == "x");
  CHECK(second_safe == "ac");
}

TEST_CASE("stop matcher: every way to cut a text gives the same result") {
  std::mt19937 random(11);
  for (int round = 0; round < 1500; ++round) {
    Stops stops(random() % 4);
    for (std::string& stop : stops) {
      for (std::size_t n = random() % 5; n > 0; --n) stop += static_cast<char>('a' + random() % 2);
    }
    std::string text;
    const std::size_t length = random() % 10;
    while (text.size() < length) text += static_cast<char>('a' + random() % 3);
    const Result expected = reference(stops, text);
    const StopMatcher matcher(stops);
    const std::uint32_t cuts = length > 1 ? 1U << (length - 1) : 1U;
    for (std::uint32_t mask = 0; mask < cuts; ++mask) {
      std::vector<std::string_view> pieces;
      std::size_t begin = 0;
      for (std::size_t end = 1; end <= length; ++end) {
        if (end < length && (mask >> (end - 1) & 1U) == 0) continue;
        pieces.push_back(std::string_view(text).substr(begin, end - begin));
        begin = end;
      }
      REQUIRE(feed(matcher, pieces) == expected);
    }
  }
}

TEST_CASE("stop matcher: long random texts of whole characters, held back no longer than needed") {
  const std::vector<std::string> alphabet = {"a", "b", "\xC3\xA9", "\xE2\x82\xAC",
                                             "\xF0\x9F\x8E\x88"};
  std::mt19937 random(13);
  for (int round = 0; round < 300; ++round) {
    Stops stops(1 + random() % 5);
    for (std::string& stop : stops) {
      for (std::size_t n = 1 + random() % 9; n > 0; --n)
        stop += alphabet[random() % alphabet.size()];
    }
    StopMatcher matcher(stops);
    std::string text;
    std::string safe;
    std::optional<std::size_t> match;
    for (int step = 0; step < 200 && !match; ++step) {
      std::string piece;
      if (random() % 6 == 0) {
        piece = stops[random() % stops.size()];
        piece.resize(piece.size() / 2);
        while (!piece.empty() && (piece.back() & 0x80) != 0) piece.pop_back();
      }
      for (std::size_t n = random() % 3; n > 0; --n) piece += alphabet[random() % alphabet.size()];
      text += piece;
      match = matcher.push(piece, safe);
      if (match) break;
      REQUIRE(safe.size() == text.size() - must_hold(stops, text));
      REQUIRE(text.starts_with(safe));
      REQUIRE((safe.size() == text.size() || !is_utf8_continuation(text[safe.size()])));
    }
    matcher.finish(safe);
    REQUIRE(Result{safe, match} == reference(stops, text));
  }
}

}  // namespace
}  // namespace batchcore
