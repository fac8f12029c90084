#include "engine/candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

namespace batchcore {
namespace {

constexpr std::size_t kGroup = 16;

bool any_in_range(const float* values, float low, float high) {
  int found = 0;
  for (std::size_t i = 0; i < kGroup; ++i) {
    found |= static_cast<int>(values[i] > low) & static_cast<int>(values[i] <= high);
  }
  return found != 0;
}

// Just below the `count`-th largest block maximum, so that at least `count` tokens are above.
float bound_of_top(std::span<const float> maxima, std::size_t count, std::vector<float>& scratch) {
  if (count > maxima.size()) return kNoLogit;
  scratch.assign(maxima.begin(), maxima.end());
  const auto nth = scratch.begin() + static_cast<std::ptrdiff_t>(count - 1);
  std::nth_element(scratch.begin(), nth, scratch.end(), std::greater<>());
  return std::nextafter(*nth, kNoLogit);
}

const Candidate& median(const Candidate& a, const Candidate& b, const Candidate& c) {
  if (comes_before(a, b)) return comes_before(b, c) ? b : comes_before(a, c) ? c : a;
  return comes_before(a, c) ? a : comes_before(b, c) ? c : b;
}

// Moves those before `pivot` to the front; returns how many, and their weight in `mass`. Swaps
// without a branch: which way a candidate goes can't be predicted.
std::size_t partition(std::span<Candidate> candidates, const Candidate pivot, double& mass) {
  std::size_t kept = 0;
  mass = 0.0;
  for (Candidate& candidate : candidates) {
    const Candidate moving = candidate;
    const bool keep = (moving.logit > pivot.logit) |
                      ((moving.logit == pivot.logit) & (moving.token < pivot.token));
    candidate = candidates[kept];
    candidates[kept] = moving;
    kept += static_cast<std::size_t>(keep);
    mass += static_cast<double>(moving.weight) * static_cast<double>(keep);
  }
  return kept;
}

}  // namespace

void gather(const LogitView& view, std::span<const float> maxima, float low, float high,
            std::vector<Candidate>& into) {
  for (std::size_t b = 0; b < maxima.size(); ++b) {
    if (!(maxima[b] > low)) continue;
    const float* values = view.block(b);
    // The second growth is the last one: candidates never outnumber the vocabulary.
    if (into.capacity() - into.size() < kLogitBlock) {
      into.reserve(into.empty() ? std::min(view.size(), 8 * kLogitBlock) : view.size());
    }
    for (std::size_t i = 0; i < kLogitBlock; i += kGroup) {
      if (!any_in_range(values + i, low, high)) continue;
      for (std::size_t j = i; j < i + kGroup; ++j) {
        if (values[j] > low && values[j] <= high) {
          into.push_back({values[j], 0.0F, static_cast<Token>(b * kLogitBlock + j)});
        }
      }
    }
  }
}

void select_top(const LogitView& view, std::span<const float> maxima, std::size_t count,
                std::vector<float>& scratch, std::vector<Candidate>& into) {
  into.clear();
  if (count == 0) return;
  const float low = bound_of_top(maxima, count, scratch);
  gather(view, maxima, low, -kNoLogit, into);
  if (into.size() > count) {
    const auto nth = into.begin() + static_cast<std::ptrdiff_t>(count);
    std::nth_element(into.begin(), nth, into.end(), comes_before);
    into.erase(nth, into.end());
  }
  std::sort(into.begin(), into.end(), comes_before);
}

std::size_t keep_mass(std::span<Candidate> candidates, double mass) {
  constexpr std::size_t kSortBelow = 32;
  std::size_t begin = 0;
  std::size_t end = candidates.size();
  while (end - begin > kSortBelow) {
    const std::size_t middle = begin + (end - begin) / 2;
    const Candidate pivot = median(candidates[begin], candidates[middle], candidates[end - 1]);
    double ahead = 0.0;
    const std::size_t kept =
        begin + partition(candidates.subspan(begin, end - begin), pivot, ahead);
    if (ahead >= mass) {
      end = kept;
      continue;
    }
    // Those ahead stay, and the pivot is the first of the rest.
    const auto rest = candidates.begin() + static_cast<std::ptrdiff_t>(kept);
    const auto at = std::find_if(rest, candidates.begin() + static_cast<std::ptrdiff_t>(end),
                                 [&](const Candidate& c) { return c.token == pivot.token; });
    std::swap(*rest, *at);
    mass -= ahead + pivot.weight;
    begin = kept + 1;
    if (mass <= 0.0) return begin;
  }
  const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(begin);
  const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(end);
  std::sort(first, last, comes_before);
  while (begin < end) {
    mass -= candidates[begin].weight;
    ++begin;
    if (mass <= 0.0) break;
  }
  return begin;
}

}  // namespace batchcore
