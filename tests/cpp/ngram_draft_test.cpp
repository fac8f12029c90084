#include "core/ngram_draft.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace batchcore {
namespace {

using Tokens = std::vector<Token>;

Draft propose(const Tokens& tokens, std::int32_t most) {
  NgramIndex index;
  Draft draft;
  index.propose(tokens, most, draft);
  return draft;
}

TEST_CASE("what followed the last two tokens before is drafted") {
  const Draft draft = propose({1, 2, 3, 4, 9, 1, 2}, 3);
  CHECK(draft.tokens == Tokens{3, 4, 9});
  CHECK(draft.match_length == 2);
}

TEST_CASE("nothing is drafted where the last two tokens are new, or there is no room") {
  CHECK(propose({}, 4).tokens.empty());
  CHECK(propose({1}, 4).tokens.empty());
  CHECK(propose({1, 1}, 4).tokens.empty());
  CHECK(propose({1, 2, 3, 4, 3}, 4).tokens.empty());  // one token alone says too little
  CHECK(propose({2, 3, 9, 1, 2, 4, 3}, 4).tokens.empty());
  CHECK(propose({1, 2, 3, 4, 9, 1, 2}, 0).tokens.empty());
}

TEST_CASE("the longest run counts, not the latest") {
  // 7 8 9 was followed by 1; 8 9, later, by 2.
  const Draft draft = propose({7, 8, 9, 1, 5, 8, 9, 2, 7, 8, 9}, 1);
  CHECK(draft.tokens == Tokens{1});
  CHECK(draft.match_length == 3);
}

TEST_CASE("of runs of one length the latest counts") {
  CHECK(propose({8, 9, 1, 8, 9, 2, 8, 9}, 1).tokens == Tokens{2});
}

TEST_CASE("runs are compared up to five tokens") {
  const Draft draft = propose({1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6}, 2);
  CHECK(draft.tokens == Tokens{7, 0});
  CHECK(draft.match_length == 5);
}

TEST_CASE("a loop is drafted as far as is wanted") {
  CHECK(propose({5, 5, 5}, 4).tokens == Tokens{5, 5, 5, 5});
  CHECK(propose({1, 2, 3, 1, 2, 3}, 5).tokens == Tokens{1, 2, 3, 1, 2});
  CHECK(propose({1, 2, 3, 1, 2, 3, 1}, 5).tokens == Tokens{2, 3, 1, 2, 3});
}

// The longest suffix with an earlier end, by looking everywhere.
Draft reference(const Tokens& tokens, std::int32_t most) {
  Draft draft;
  const auto size = static_cast<std::int32_t>(tokens.size());
  for (std::int32_t n = 5; n >= 2; --n) {
    for (std::int32_t end = size - 1; end >= n; --end) {
      if (!std::equal(tokens.end() - n, tokens.end(), tokens.begin() + end - n)) continue;
      draft.match_length = n;
      for (std::int32_t i = 0; i < most; ++i) {
        const std::int32_t at = end + i;
        draft.tokens.push_back(at < size ? tokens[static_cast<std::size_t>(at)]
                                         : draft.tokens[static_cast<std::size_t>(at - size)]);
      }
      return draft;
    }
  }
  return draft;
}

TEST_CASE(
    "the index finds what looking everywhere finds, while tokens come in ones and in chunks") {
  std::mt19937 random(3);
  int found = 0;
  int missed = 0;
  for (int run = 0; run < 20; ++run) {
    NgramIndex index;
    Tokens tokens;
    const unsigned vocabulary = 3 + static_cast<unsigned>(run) * 4;
    while (tokens.size() < 600) {
      const auto chunk = run % 3 == 0 ? 1 + random() % 50 : 1;
      for (std::size_t i = 0; i < chunk; ++i) {
        tokens.push_back(static_cast<Token>(random() % vocabulary));
      }
      Draft draft;
      index.propose(tokens, 4, draft);
      const Draft expected = reference(tokens, 4);
      found += expected.tokens.empty() ? 0 : 1;
      // A place that two runs share belongs to the later one.
      if (draft.match_length == expected.match_length) {
        CHECK(draft.tokens == expected.tokens);
      } else {
        CHECK(draft.match_length < expected.match_length);
        missed += 1;
      }
    }
  }
  CHECK(found > 2000);
  CHECK(missed < found / 5);
}

TEST_CASE("very long texts forget what is long past, and nothing else breaks") {
  std::mt19937 random(5);
  NgramIndex index;
  Tokens tokens;
  Draft draft;
  for (int i = 0; i < 200'000; ++i) tokens.push_back(static_cast<Token>(random() % 50'000));
  index.propose(tokens, 4, draft);
  const Tokens recent(tokens.end() - 100, tokens.end() - 90);
  const Tokens next(tokens.end() - 90, tokens.end() - 86);
  tokens.insert(tokens.end(), recent.begin(), recent.end());
  index.propose(tokens, 4, draft);
  CHECK(draft.tokens == next);
}

}  // namespace
}  // namespace batchcore
