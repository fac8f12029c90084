#include "core/ngram_draft.h"

#include <algorithm>
#include <bit>

namespace batchcore {
namespace {

// A hash has one place, and the latest run takes it: so the table must stay sparse.
constexpr std::size_t kPlacesPerToken = 16;
constexpr std::size_t kMinPlaces = 1024;
constexpr std::size_t kMaxPlaces = std::size_t{1} << 17U;

// Of a run that is one token longer to the left.
std::uint64_t extend(std::uint64_t hash, Token token) {
  return (hash ^ static_cast<std::uint32_t>(token)) * 0xD1342543DE82EF95ULL + 1;
}

}  // namespace

void NgramIndex::resize(std::size_t num_tokens) {
  const std::size_t places =
      std::clamp(std::bit_ceil(num_tokens * kPlacesPerToken), kMinPlaces, kMaxPlaces);
  ends_.assign(places, 0);
  shift_ = 64 - std::countr_zero(places);
  num_taken_ = 0;
}

void NgramIndex::take_in(std::span<const Token> tokens, std::size_t until) {
  const bool is_dense = until * kPlacesPerToken > 2 * ends_.size();
  if (ends_.empty() || (is_dense && ends_.size() < kMaxPlaces)) resize(until);
  for (; num_taken_ < until; ++num_taken_) {
    const std::size_t end = num_taken_ + 1;
    std::uint64_t hash = 0;
    for (std::size_t n = 1; n <= std::min<std::size_t>(end, kLongest); ++n) {
      hash = extend(hash, tokens[end - n]);
      if (n >= kShortest) ends_of(hash) = static_cast<std::int32_t>(end);
    }
  }
}

void NgramIndex::propose(std::span<const Token> tokens, std::int32_t most, Draft& draft) {
  draft.clear();
  const std::size_t size = tokens.size();
  if (size == 0 || most <= 0) return;
  take_in(tokens, size - 1);  // not what the sequence ends with, which would only find itself
  std::size_t found = 0;
  std::uint64_t hash = 0;
  for (std::size_t n = 1; n <= std::min<std::size_t>(size, kLongest); ++n) {
    hash = extend(hash, tokens[size - n]);
    if (n < kShortest) continue;
    const auto end = static_cast<std::size_t>(ends_of(hash));
    if (end < n) continue;
    const auto run = tokens.last(n);  // two runs may share a place
    if (!std::equal(run.begin(), run.end(), tokens.subspan(end - n).begin())) continue;
    found = end;
    draft.match_length = static_cast<std::int32_t>(n);
  }
  if (found == 0) return;
  for (std::size_t i = 0; i < static_cast<std::size_t>(most); ++i) {
    const std::size_t at = found + i;
    draft.tokens.push_back(at < size ? tokens[at] : draft.tokens[at - size]);
  }
}

}  // namespace batchcore
