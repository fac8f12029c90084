// How many drafted tokens a step verifies. Pure policy, by what is measured: how often drafts turn
// out right, and how long calls of so many rows take.
//
// Whether drafts are right is learnt from all of them, also those that nothing was computed for:
// the token that comes next anyway says whether the first one was. So there is nothing to lose by
// learning, and no draft has to be tried for it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/call_times.h"
#include "core/ngram_draft.h"
#include "core/step_cost.h"

namespace batchcore {

struct Sequence;

/// Drafted tokens of one sequence and step, at most.
inline constexpr std::int32_t kMaxDrafts = 16;
/// With row_group 1: rows beyond the largest call that was measured, for which its time is
/// predicted.
inline constexpr std::int32_t kMaxGuessedRows = 4;

/// How often a drafted token was right, recently, by how many tokens before it had occurred in the
/// same order (NgramIndex::kShortest to kLongest, and more).
class DraftRates {
 public:
  /// What was seen `memory` tokens ago counts a third of what is seen now.
  explicit DraftRates(double memory) : kept_(1.0 - 1.0 / memory) {}

  void record(std::int32_t match_length, bool is_right);

  /// The share that is right; `expected`, as if it had been seen `weight` times, is added to what
  /// was seen.
  [[nodiscard]] double share(std::int32_t match_length, double expected, double weight) const;

 private:
  static constexpr std::size_t kClasses = NgramIndex::kLongest - NgramIndex::kShortest + 1;
  struct Rate {
    double right = 0.0;
    double all = 0.0;
  };
  [[nodiscard]] static std::size_t class_of(std::int32_t match_length);

  double kept_;
  std::array<Rate, kClasses> rates_{};
};

/// Drafts of a sequence, and how likely each is right together with all before it.
struct DraftOffer {
  std::array<double, kMaxDrafts> chances{};
  std::int32_t count = 0;
  std::int32_t kv_tokens = 0;  ///< that a row of it attends to
};

/// An offer, by the sequence's own rates where there is something in them, and else by those of the
/// whole engine.
[[nodiscard]] DraftOffer make_offer(const Draft& draft, std::int32_t kv_tokens,
                                    const DraftRates& own, const DraftRates& of_engine);

/// Drafted tokens that a sequence has use for, and whose cells can be taken back: no more than it
/// may still produce behind the next token, none where the memory can't be cut back.
[[nodiscard]] std::int32_t most_drafts(const Sequence& sequence, const BackendInfo& info,
                                       std::int32_t wanted);

/// What the step has room for beside one row for each sequence.
struct DraftRoom {
  std::int32_t plain_rows = 0;  ///< of the call without drafts, with the dummy rows it would get
  std::int32_t extra_rows = 0;  ///< drafts at most
  std::int32_t row_group = BackendInfo{}.row_group;  ///< BackendInfo's
  bool same_for_all = false;  ///< each sequence must have as many rows as the others
  double longest_s = std::numeric_limits<double>::infinity();  ///< the call may take
};

/// Drafts to verify of each of `offers`, one per sequence that decodes: as many as make most tokens
/// per second (SmartSpec's goodput, arXiv 2406.14066); none where that is not clearly more than
/// without. Rows are taken only up to the first size of call that was not measured yet, so that a
/// wrong prediction costs a few calls. With row_group 1, where calls of neighbouring sizes take
/// about as long, up to kMaxGuessedRows beyond the largest size that was measured.
[[nodiscard]] std::vector<std::int32_t> choose_drafts(std::span<const DraftOffer> offers,
                                                      const DraftRoom& room, const CallTimes& times,
                                                      const StepCost& cost);

}  // namespace batchcore
