#include <algorithm>
#include <span>
#include <vector>

#include "core/planner.h"

namespace batchcore {
namespace {

// Nobody waits for another sequence to compute less than this.
constexpr std::int32_t kMinWorthWaiting = 32;
// Nor is less than this restored from host memory.
constexpr std::int32_t kMinHostTokens = 64;

std::int32_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<std::int32_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                   a.begin());
}

bool contains(std::span<const SeqId> slots, SeqId slot) {
  return std::find(slots.begin(), slots.end(), slot) != slots.end();
}

}  // namespace

std::int32_t Planner::expected_tokens(const Sequence& sequence) const {
  if (sequence.num_preemptions >= config_.max_preemptions) return sequence.max_tokens_total;
  const std::int32_t fair_share = state_.info.num_cells / config_.max_num_seqs;
  return sequence.num_prompt_tokens +
         state_.history.expected(sequence.num_generated(),
                                 sequence.max_tokens_total - sequence.num_prompt_tokens,
                                 fair_share);
}

// Past-Future admission (arXiv 2507.10150): with the sequences sorted by what they still have to
// generate, the memory peaks when one of them ends; every such peak has to fit.
bool Planner::fits_in_future(const Sequence& candidate, const PrefixMatch& prefix) const {
  if (!unified_) return true;
  struct Growth {
    std::int32_t remaining;
    std::int32_t own;
  };
  std::vector<Growth> growths;
  std::int64_t base = state_.kv.num_active_cells();
  const auto add = [&](const Sequence& sequence, std::int32_t computed, std::int32_t shared) {
    const std::int32_t own = sequence.num_tokens() - shared;
    base += sequence.num_tokens() - computed;  // cells that its pending tokens will take
    base -= own;
    const std::int32_t remaining = std::max(expected_tokens(sequence) - sequence.num_tokens(), 0);
    for (std::int32_t i = 0; i <= sequence.num_forks; ++i) {
      growths.push_back({remaining, i == 0 ? own : 0});
    }
  };
  for (const Sequence* sequence : state_.running) {
    if (is_preempted(sequence)) {
      base -= sequence->num_computed - sequence->num_shared;
    } else {
      add(*sequence, sequence->num_computed, sequence->num_shared);
    }
  }
  for (const Admission& admission : plan_.admissions) {
    add(*admission.sequence, admission.prefix_length, admission.prefix_length);
    if (is_cached(admission.prefix_slot)) base += admission.prefix_length;
  }
  add(candidate, prefix.length, prefix.length);
  // Cells of a cached prefix are not active yet; where two share one, this counts them twice.
  if (prefix.is_cached) base += prefix.length;
  std::sort(growths.begin(), growths.end(),
            [](const Growth& a, const Growth& b) { return a.remaining > b.remaining; });
  std::int64_t own = 0;
  std::int64_t alive = 0;
  for (const Growth& growth : growths) {
    own += growth.own;
    alive += 1;
    if (base + own + alive * growth.remaining > state_.info.num_cells) return false;
  }
  return true;
}

// True where a running sequence is about to compute a good part of what `candidate` needs.
bool Planner::is_worth_waiting(const Sequence& candidate, std::int32_t have) const {
  // A recurrent state has moved past the common part by the time it can be copied.
  if (state_.serves_whole_slots_only()) return false;
  const std::int32_t least = unified_ ? kMinWorthWaiting : kMinStreamCopy;
  const auto reaches = [&](const Sequence& other, std::int32_t computed) {
    if (other.num_tokens() - computed <= 1) return false;
    const std::int32_t common = common_prefix(candidate.tokens, other.tokens);
    return common > computed && common - std::max(have, computed) >= least &&
           common - have >= least;
  };
  for (const Sequence* other : state_.running) {
    if (!is_preempted(other) && reaches(*other, other->num_computed)) return true;
  }
  return std::any_of(plan_.admissions.begin(), plan_.admissions.end(),
                     [&](const Admission& a) { return reaches(*a.sequence, a.prefix_length); });
}

PrefixMatch Planner::find_prefix(const Sequence& sequence) const {
  if (!config_.prefix_caching) return {};
  // The last token is always computed: its logits are what the step is for.
  const std::span<const Token> prompt(sequence.tokens.data(), sequence.tokens.size() - 1);
  const PrefixMatch match = state_.kv.longest_match(prompt, state_.serves_whole_slots_only());
  if (match.length == 0 || is_removed(match.slot)) return {};
  if (!unified_ && !match.is_cached && match.length < kMinStreamCopy) return {};
  return match;
}

// A prefix in host memory that goes far enough beyond what a slot holds to be worth the copy.
HostCache::Match Planner::find_host_prefix(const Sequence& sequence, std::int32_t have) const {
  if (!config_.prefix_caching || state_.host.size() == 0) return {};
  const std::span<const Token> prompt(sequence.tokens.data(), sequence.tokens.size() - 1);
  const HostCache::Match match =
      state_.host.longest_match(prompt, state_.serves_whole_slots_only());
  if (match.length - have < kMinHostTokens) return {};
  const bool pays = config_.preemption == PreemptionMode::kSave || !state_.cost.is_ready() ||
                    state_.copy_speed.seconds(match.entry->state.size()) <
                        (match.length - have) * state_.cost.seconds_per_prefill_token();
  return pays ? match : HostCache::Match{};
}

// Gives `candidate` a slot that starts with `match`, or with `num_restored` tokens from a state
// in host memory that needs `num_cells`, and its first rows. False, and nothing but evictions
// planned, where there is no room.
bool Planner::place(Sequence* candidate, const PrefixMatch& match, std::int32_t num_restored,
                    std::int32_t num_cells) {
  const bool alone = is_alone();
  const bool takes_over = may_take_over(match);
  Admission admission{candidate, -1, match.slot, match.length, nullptr};
  if (!unified_ && !takes_over && match.length < kMinStreamCopy) {
    admission.prefix_slot = -1;
    admission.prefix_length = 0;
  }
  const bool one_row =
      candidate->num_tokens() - std::max(admission.prefix_length, num_restored) == 1;
  // In streams a single row joins the decode call, which has room for every slot.
  if (budget_ <= 0 && (unified_ || !one_row)) return false;
  if (!alone && !fits_in_future(*candidate, match)) return false;

  const std::size_t num_kept = kept_.size();
  const std::size_t num_taken = taken_.size();
  if (admission.prefix_slot >= 0) kept_.push_back(admission.prefix_slot);
  admission.slot = takes_over ? match.slot : take_slot();
  const auto has_rows = [&] {
    if (admission.slot < 0) return false;
    kept_.push_back(admission.slot);
    if (!secure_cells(num_cells + 1, alone ? candidate : nullptr)) return false;
    planned_cells_ += num_cells;
    if (one_row) {
      decoding_.push_back(candidate);
      planned_cells_ += 1;
      if (unified_) {
        budget_ -= 1;
        rows_left_ -= 1;
      }
      return true;
    }
    if (plan_chunk(candidate, std::max(admission.prefix_length, num_restored), alone) > 0) {
      return true;
    }
    planned_cells_ -= num_cells;
    return false;
  };
  if (!has_rows()) {
    kept_.resize(num_kept);
    taken_.resize(num_taken);
    return false;
  }
  count(*candidate, 1);
  plan_.admissions.push_back(admission);
  return true;
}

// A cached slot is taken over where all of it is wanted; in streams, where a copy moves a whole
// stream, always.
bool Planner::may_take_over(const PrefixMatch& match) const {
  return match.slot >= 0 && match.is_cached && !is_pinned(match.slot) &&
         !contains(kept_, match.slot) &&
         (!unified_ || match.length == state_.kv.length(match.slot));
}

// The lowest free slot (ids stay dense, which streams need), else one that is emptied for it.
SeqId Planner::take_slot() {
  for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
    const bool is_free = state_.kv.state(slot) == KvTree::SlotState::kFree || is_removed(slot);
    if (is_free && !contains(taken_, slot)) {
      taken_.push_back(slot);
      return slot;
    }
  }
  if (!evict_one(is_alone())) return -1;
  taken_.push_back(plan_.evictions.back());
  return taken_.back();
}

}  // namespace batchcore
