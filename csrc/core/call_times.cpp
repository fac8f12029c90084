#include "core/call_times.h"

#include <algorithm>

#include "core/backend.h"

namespace batchcore {
namespace {

// What was slower is tried again after this many calls: machines get busy and idle.
constexpr std::int64_t kTryAgain = 400;
// Dummy rows have to save this share of a call; less is noise.
constexpr double kLeastGain = 0.02;

}  // namespace

double CallTimes::Times::median() const {
  std::array<double, kSamples> sorted = recent;
  std::nth_element(sorted.begin(), sorted.begin() + kSamples / 2, sorted.end());
  return sorted[kSamples / 2];
}

const CallTimes::Times* CallTimes::find(std::int32_t rows) const {
  const auto i = static_cast<std::size_t>(rows);
  return i < times_.size() ? &times_[i] : nullptr;
}

void CallTimes::observe(std::int32_t rows, double seconds) {
  const auto i = static_cast<std::size_t>(rows);
  if (i >= times_.size()) times_.resize(i + 1);
  Times& times = times_[i];
  times.recent[times.count++ % kSamples] = seconds;
  times.last = ++num_calls_;
}

std::optional<double> CallTimes::seconds(std::int32_t rows) const {
  const Times* times = find(rows);
  if (times == nullptr || !times->is_known()) return std::nullopt;
  return times->median();
}

std::int64_t CallTimes::age(std::int32_t rows) const {
  const Times* times = find(rows);
  return num_calls_ - (times == nullptr ? 0 : times->last);
}

std::int32_t CallTimes::largest() const {
  const auto last =
      std::find_if(times_.rbegin(), times_.rend(), [](const Times& one) { return one.is_known(); });
  return last == times_.rend() ? 0 : static_cast<std::int32_t>(times_.rend() - last) - 1;
}

std::int32_t CallTimes::preferred(std::int32_t rows, std::int32_t row_group) const {
  const std::int32_t whole = next_multiple(rows, row_group);
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
