#include "core/row_shapes.h"

#include <algorithm>

namespace batchcore {
namespace {

// What was slower is tried again after this many calls: machines get busy and idle.
constexpr std::int64_t kTryAgain = 400;
// Dummy rows have to save this share of a call; less is noise.
constexpr double kLeastGain = 0.02;

}  // namespace

double RowShapes::Times::median() const {
  std::array<double, kSamples> sorted = recent;
  std::nth_element(sorted.begin(), sorted.begin() + kSamples / 2, sorted.end());
  return sorted[kSamples / 2];
}

const RowShapes::Times* RowShapes::find(std::int32_t rows) const {
  const auto i = static_cast<std::size_t>(rows);
  return i < times_.size() ? &times_[i] : nullptr;
}

void RowShapes::observe(std::int32_t rows, double seconds) {
  const auto i = static_cast<std::size_t>(rows);
  if (i >= times_.size()) times_.resize(i + 1);
  Times& times = times_[i];
  times.recent[times.count++ % kSamples] = seconds;
  times.last = ++num_calls_;
}

std::optional<double> RowShapes::seconds(std::int32_t rows) const {
  const Times* times = find(rows);
  if (times == nullptr || !times->is_known()) return std::nullopt;
  return times->median();
}

std::int64_t RowShapes::age(std::int32_t rows) const {
  const Times* times = find(rows);
  return num_calls_ - (times == nullptr ? 0 : times->last);
}

std::int32_t RowShapes::preferred(std::int32_t rows) const {
  const std::int32_t whole = next_group(rows);
  if (whole == rows) return rows;
  const Times* plain = find(rows);
  if (plain == nullptr || !plain->is_known()) return rows;
  const Times* filled = find(whole);
  if (filled == nullptr || !filled->is_known()) return whole;
  const bool filled_wins = filled->median() < plain->median() * (1 - kLeastGain);
  const Times* loser = filled_wins ? plain : filled;
  if (num_calls_ - loser->last > kTryAgain) return filled_wins ? rows : whole;
  return filled_wins ? whole : rows;
}

}  // namespace batchcore
