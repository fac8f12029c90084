#include "core/speculation.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/sequence.h"

namespace batchcore {
namespace {

// What is expected of drafts before any was seen: too little for rows that are not nearly free.
constexpr double kFirstGuess = 0.25;
constexpr double kGuessWeight = 4.0;
// What the engine has seen counts as so many drafts of the sequence's own.
constexpr double kEngineWeight = 2.0;
// More tokens per second than without, at least; less is noise.
constexpr double kLeastGain = 0.05;
// A call without drafts is made after this many others, to know what drafts have to beat.
constexpr std::int64_t kPlainEvery = 100;
// What a size of call took so long ago is believed only where a prediction from others says no
// better.
constexpr std::int64_t kTryAgain = 400;

// What calls take, apart from attention, from small ones to large ones.
class Prices {
 public:
  Prices(const CallTimes& times, const DraftRoom& room, double plain_s, double row_s)
      : times_(times), rows_(room.plain_rows), seconds_(plain_s), row_s_(row_s) {
    if (room.row_group > 1 || room.same_for_all) return;
    guesses_below_ = std::max(times.largest(), rows_) + kMaxGuessedRows;
    min_distance_ = kMaxGuessedRows;
  }

  // Of the next larger size. False if it can't be predicted: behind an unknown size from
  // guesses_below_ on.
  bool next(std::int32_t rows, double& seconds) {
    if (is_guessing_) return false;
    const auto measured = times_.seconds(rows);
    const double more = std::max(rows - rows_, 0);
    const double guess = seconds_ + row_s_ * more;
    if (!measured) {
      is_guessing_ = rows >= guesses_below_;
      seconds = guess;
      return true;
    }
    seconds = times_.age(rows) > kTryAgain ? std::min(*measured, guess) : *measured;
    if (more >= min_distance_) {  // rows get no cheaper than they were so far
      row_s_ = std::max(row_s_, (*measured - seconds_) / more);
      rows_ = rows;
      seconds_ = *measured;
    }
    return true;
  }

 private:
  const CallTimes& times_;
  std::int32_t rows_;
  double seconds_;
  double row_s_;
  std::int32_t guesses_below_ = 0;
  double min_distance_ = 1.0;  // rows between sizes that say what a row costs: closer, it is noise
  bool is_guessing_ = false;
};

struct Choice {
  double gain = 1.0 + kLeastGain;
  std::int32_t size = 0;  // drafts in all, or of each
};

// Drafts in the order in which they are worth a row. Those of a sequence keep theirs.
std::vector<std::int32_t> by_chance(std::span<const DraftOffer> offers) {
  std::vector<std::pair<double, std::int32_t>> all;
  for (std::size_t s = 0; s < offers.size(); ++s) {
    for (std::int32_t i = 0; i < offers[s].count; ++i) {
      all.emplace_back(offers[s].chances[static_cast<std::size_t>(i)],
                       static_cast<std::int32_t>(s));
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<std::int32_t> order;
  order.reserve(all.size());
  for (const auto& [chance, sequence] : all) order.push_back(sequence);
  return order;
}

}  // namespace

std::size_t DraftRates::class_of(std::int32_t match_length) {
  return static_cast<std::size_t>(
      std::clamp(match_length, NgramIndex::kShortest, NgramIndex::kLongest) -
      NgramIndex::kShortest);
}

void DraftRates::record(std::int32_t match_length, bool is_right) {
  Rate& rate = rates_[class_of(match_length)];
  rate.right = rate.right * kept_ + (is_right ? 1.0 : 0.0);
  rate.all = rate.all * kept_ + 1.0;
}

double DraftRates::share(std::int32_t match_length, double expected, double weight) const {
  const Rate& rate = rates_[class_of(match_length)];
  return (rate.right + weight * expected) / (rate.all + weight);
}

DraftOffer make_offer(const Draft& draft, std::int32_t kv_tokens, const DraftRates& own,
                      const DraftRates& of_engine) {
  DraftOffer offer;
  offer.kv_tokens = kv_tokens;
  offer.count = std::min(static_cast<std::int32_t>(draft.tokens.size()), kMaxDrafts);
  double chance = 1.0;
  for (std::int32_t i = 0; i < offer.count; ++i) {
    const std::int32_t length = draft.match_length + i;  // were those before it right
    const double expected = of_engine.share(length, kFirstGuess, kGuessWeight);
    chance *= own.share(length, expected, kEngineWeight);
    offer.chances[static_cast<std::size_t>(i)] = chance;
  }
  return offer;
}

std::int32_t most_drafts(const Sequence& sequence, const BackendInfo& info, std::int32_t wanted) {
  if (info.memory == MemoryKind::kRecurrent || info.memory == MemoryKind::kHybrid) return 0;
  const std::int32_t size = sequence.num_tokens();
  // Sliding windows need no limit: a call takes only cells that its first row no longer sees, so
  // that a memory which is cut back to any of its rows still holds the window behind it.
  const std::int32_t most = std::min(
      {wanted, kMaxDrafts, sequence.max_tokens_total - size - 1, info.cells_per_slot - size});
  return std::max(most, 0);
}

std::vector<std::int32_t> choose_drafts(std::span<const DraftOffer> offers, const DraftRoom& room,
                                        const CallTimes& times, const StepCost& cost) {
  std::vector<std::int32_t> chosen(offers.size(), 0);
  const auto plain = times.seconds(room.plain_rows);
  if (!plain || times.age(room.plain_rows) > kPlainEvery) return chosen;
  const std::array<double, 4> fit = cost.coefficients();
  const auto num_sequences = static_cast<std::int32_t>(offers.size());
  std::int64_t kv_tokens = 0;
  for (const DraftOffer& offer : offers) kv_tokens += offer.kv_tokens;
  const double base_s = *plain + fit[3] * static_cast<double>(kv_tokens);
  double tokens = num_sequences;
  Prices prices(times, room, *plain, fit[2]);
  Choice best;
  const auto consider = [&](std::int32_t rows, std::int32_t size) {
    double seconds = 0.0;
    if (!prices.next(rows, seconds)) return false;
    seconds += fit[3] * static_cast<double>(kv_tokens);
    const double gain = tokens / seconds * base_s / num_sequences;
    if (seconds <= room.longest_s && gain > best.gain) best = {gain, size};
    return true;
  };

  if (room.same_for_all) {
    const auto fewest = std::min_element(
        offers.begin(), offers.end(),
        [](const DraftOffer& a, const DraftOffer& b) { return a.count < b.count; });
    if (fewest == offers.end()) return chosen;
    const std::int64_t each = kv_tokens;
    for (std::int32_t k = 1; k <= fewest->count && k * num_sequences <= room.extra_rows; ++k) {
      for (const DraftOffer& offer : offers) {
        tokens += offer.chances[static_cast<std::size_t>(k - 1)];
      }
      kv_tokens += each;
      if (!consider(num_sequences * (1 + k), k)) break;
    }
    std::fill(chosen.begin(), chosen.end(), best.size);
    return chosen;
  }

  const std::vector<std::int32_t> order = by_chance(offers);
  const std::int32_t most = std::min(static_cast<std::int32_t>(order.size()), room.extra_rows);
  std::vector<std::int32_t> taken(offers.size(), 0);
  for (std::int32_t i = 0; i < most; ++i) {
    const auto s = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
    tokens += offers[s].chances[static_cast<std::size_t>(taken[s]++)];
    kv_tokens += offers[s].kv_tokens;
    // Whole groups: sizes that the kernels compute without a remainder, and few, so soon known.
    const std::int32_t rows = num_sequences + i + 1;
    if (rows % room.row_group != 0 && i + 1 < most) continue;
    if (!consider(rows, i + 1)) break;
  }
  for (std::int32_t i = 0; i < best.size; ++i) {
    chosen[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] += 1;
  }
  return chosen;
}

}  // namespace batchcore
