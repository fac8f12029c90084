#include "core/scheduler.h"

#include <algorithm>
#include <limits>

namespace batchcore {
namespace {

// Prefill chunks in tokens. Multiples of the CPU kernels' row groups, and large enough that prefill
// keeps most of its throughput (docs/design.md has the measurement).
constexpr std::int32_t kRowGroup = 4;
constexpr std::int32_t kMinChunkLatency = 16;
constexpr std::int32_t kMinChunkBalanced = 64;
// Steps with prefill may take this multiple of a step without, where no target is given.
constexpr double kDefaultSlowdown = 2.5;
// A prefix shorter than this is computed again rather than copied between streams, which moves a
// whole stream's buffer; and nobody waits for another sequence to compute less than this.
constexpr std::int32_t kMinStreamCopy = 64;
constexpr std::int32_t kMinWorthWaiting = 32;
// Waiting sequences that are looked at behind one that waits for its prefix.
constexpr int kMaxLookahead = 16;

std::int32_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<std::int32_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                   a.begin());
}

bool contains(std::span<const SeqId> slots, SeqId slot) {
  return std::find(slots.begin(), slots.end(), slot) != slots.end();
}

// Works out one plan: what the state would be after each decision is kept here, the state stays as
// it is.
class Planner {
 public:
  Planner(const SchedulerConfig& config, const SchedulerState& state)
      : config_(config), state_(state), unified_(state.info.layout == KvLayout::kUnified) {
    num_sequences_ = 0;
    for (const Sequence* sequence : state.running) {
      num_sequences_ += 1 + sequence->num_forks;
      kept_.push_back(sequence->slot);
    }
  }

  StepPlan plan() {
    choose_decoding();
    budget_ = prefill_budget();
    continue_prefill();
    admit();
    build_micro_batches();
    return std::move(plan_);
  }

 private:
  [[nodiscard]] bool is_preempted(const Sequence* sequence) const {
    return std::find(plan_.preemptions.begin(), plan_.preemptions.end(), sequence) !=
           plan_.preemptions.end();
  }

  [[nodiscard]] bool is_cached(SeqId slot) const {
    return slot >= 0 && state_.kv.state(slot) == KvTree::SlotState::kCached;
  }

  [[nodiscard]] bool serves_whole_slots_only() const {
    return state_.info.memory == MemoryKind::kRecurrent ||
           state_.info.memory == MemoryKind::kHybrid;
  }

  [[nodiscard]] std::int32_t free_cells() const {
    return state_.info.num_cells - state_.kv.num_cells() + state_.kv.cells_freed_by(removed_) -
           planned_cells_;
  }

  // Evicts cached prefixes, and where `requester` is given preempts sequences that rank behind it,
  // until `cells` are free. False where that is not to be had; what was evicted stays evicted.
  bool secure_cells(std::int32_t cells, const Sequence* requester) {
    if (!unified_) return true;  // a slot's own partition is as long as the longest sequence
    while (free_cells() < cells) {
      if (evict_one()) continue;
      if (requester == nullptr || !preempt_one_behind(*requester)) return false;
    }
    return true;
  }

  bool evict_one() {
    SeqId oldest = -1;
    for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
      const auto i = static_cast<std::size_t>(slot);
      if (state_.kv.state(slot) != KvTree::SlotState::kCached || state_.pinned[i]) continue;
      if (contains(removed_, slot) || contains(kept_, slot)) continue;
      if (oldest < 0 || state_.last_used[i] < state_.last_used[static_cast<std::size_t>(oldest)]) {
        oldest = slot;
      }
    }
    if (oldest < 0) return false;
    plan_.evictions.push_back(oldest);
    removed_.push_back(oldest);
    return true;
  }

  bool preempt_one_behind(const Sequence& requester) {
    Sequence* victim = nullptr;
    for (Sequence* candidate : state_.running) {
      if (candidate->rank <= requester.rank || is_preempted(candidate)) continue;
      const bool worn = candidate->num_preemptions >= config_.max_preemptions;
      const bool victim_worn =
          victim != nullptr && victim->num_preemptions >= config_.max_preemptions;
      if (victim == nullptr || worn < victim_worn ||
          (worn == victim_worn && victim->rank < candidate->rank)) {
        victim = candidate;
      }
    }
    if (victim == nullptr) return false;
    plan_.preemptions.push_back(victim);
    removed_.push_back(victim->slot);
    num_sequences_ -= 1 + victim->num_forks;
    if (std::erase(decoding_, victim) > 0) planned_cells_ -= 1;
    std::erase_if(prefill_, [&](const PlannedRows& rows) {
      if (rows.sequence != victim) return false;
      planned_cells_ -= rows.count;
      return true;
    });
    return true;
  }

  // Every sequence that decodes is in every step; in rank order, so that a sequence which can't get
  // a cell is always the last in rank.
  void choose_decoding() {
    for (Sequence* sequence : state_.running) {
      if (!sequence->is_decoding() || is_preempted(sequence)) continue;
      if (secure_cells(1, sequence)) {
        decoding_.push_back(sequence);
        planned_cells_ += 1;
      } else {
        plan_.preemptions.push_back(sequence);
        removed_.push_back(sequence->slot);
        num_sequences_ -= 1;
      }
    }
  }

  [[nodiscard]] std::int32_t prefill_budget() const {
    const auto rows = static_cast<std::int32_t>(decoding_.size());
    const std::int32_t most = unified_ ? state_.info.n_ubatch - rows : state_.info.n_ubatch;
    if (rows == 0 || config_.prefill_policy == PrefillPolicy::kThroughput) return most;
    const std::int32_t floor = std::min(
        config_.prefill_policy == PrefillPolicy::kLatency ? kMinChunkLatency : kMinChunkBalanced,
        most);
    if (!state_.cost.is_ready()) return floor;
    StepWork work{0, rows, 0};
    for (const Sequence* sequence : decoding_) work.kv_tokens += sequence->num_tokens();
    const double alone = state_.cost.seconds(work);
    const double target =
        config_.target_itl_s > 0 ? config_.target_itl_s : alone * kDefaultSlowdown;
    const double per_token = state_.cost.seconds_per_prefill_token();
    const double left = per_token > 0 ? (target - alone) / per_token : most;
    const auto chunk = static_cast<std::int32_t>(std::clamp(left, 0.0, static_cast<double>(most)));
    return std::clamp(chunk / kRowGroup * kRowGroup, floor, most);
  }

  // As many of the next pending tokens as the budget and the cells allow; 0 where none.
  std::int32_t plan_chunk(Sequence* sequence, std::int32_t num_computed, bool may_preempt) {
    std::int32_t count = std::min(sequence->num_tokens() - num_computed, budget_);
    if (count <= 0) return 0;
    if (unified_ && !secure_cells(count, may_preempt ? sequence : nullptr)) {
      count = std::min(count, free_cells());
      if (count <= 0) return 0;
    }
    planned_cells_ += count;
    budget_ -= count;
    prefill_.push_back({sequence, count});
    return count;
  }

  void continue_prefill() {
    for (Sequence* sequence : state_.running) {
      if (budget_ <= 0) return;
      if (sequence->is_decoding() || is_preempted(sequence)) continue;
      plan_chunk(sequence, sequence->num_computed, true);
    }
  }

  [[nodiscard]] std::int32_t expected_tokens(const Sequence& sequence) const {
    if (sequence.num_preemptions >= config_.max_preemptions) return sequence.max_tokens_total;
    const std::int32_t fair_share = state_.info.num_cells / config_.max_num_seqs;
    return sequence.num_prompt_tokens +
           state_.history.expected(sequence.num_generated(),
                                   sequence.max_tokens_total - sequence.num_prompt_tokens,
                                   fair_share);
  }

  // Past-Future admission (arXiv 2507.10150): with the sequences sorted by what they still have to
  // generate, the memory peaks when one of them ends; every such peak has to fit.
  [[nodiscard]] bool fits_in_future(const Sequence& candidate, const PrefixMatch& prefix) const {
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
  [[nodiscard]] bool is_worth_waiting(const Sequence& candidate, std::int32_t have) const {
    // A recurrent state has moved past the common part by the time it can be copied.
    if (serves_whole_slots_only()) return false;
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

  [[nodiscard]] PrefixMatch find_prefix(const Sequence& sequence) const {
    if (!config_.prefix_caching) return {};
    // The last token is always computed: its logits are what the step is for.
    const std::span<const Token> prompt(sequence.tokens.data(), sequence.tokens.size() - 1);
    const PrefixMatch match = state_.kv.longest_match(prompt, serves_whole_slots_only());
    if (match.length == 0 || contains(removed_, match.slot)) return {};
    if (!unified_ && !match.is_cached && match.length < kMinStreamCopy) return {};
    return match;
  }

  void admit() {
    int skipped = 0;
    for (const auto& [rank, candidate] : state_.waiting) {
      if (num_sequences_ + 1 + candidate->num_forks > config_.max_num_seqs) return;
      if (!try_admit(candidate)) return;
      if (plan_.admissions.empty() || plan_.admissions.back().sequence != candidate) {
        if (++skipped > kMaxLookahead) return;
      }
    }
  }

  // False where nobody behind this one may be admitted either.
  bool try_admit(Sequence* candidate) {
    if (candidate->num_saved > 0) return place(candidate, {}, candidate->num_saved);
    const PrefixMatch match = find_prefix(*candidate);
    if (config_.prefix_caching && is_worth_waiting(*candidate, match.length)) return true;
    if (place(candidate, match, 0)) return true;
    // Alone, it must get in: the slot that holds its prefix may be what takes up the room.
    return is_alone() && match.slot >= 0 && place(candidate, {}, 0);
  }

  [[nodiscard]] bool is_alone() const { return decoding_.empty() && prefill_.empty(); }

  // Gives `candidate` a slot that starts with `match` or with `num_saved` restored tokens, and its
  // first rows. False, and nothing but evictions planned, where there is no room.
  bool place(Sequence* candidate, const PrefixMatch& match, std::int32_t num_saved) {
    const bool alone = is_alone();
    const bool takes_over = may_take_over(match);
    Admission admission{candidate, -1, match.slot, match.length};
    if (!unified_ && !takes_over && match.length < kMinStreamCopy) {
      admission.prefix_slot = -1;
      admission.prefix_length = 0;
    }
    const bool one_row =
        candidate->num_tokens() - std::max(admission.prefix_length, num_saved) == 1;
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
      if (!secure_cells(num_saved + 1, alone ? candidate : nullptr)) return false;
      planned_cells_ += num_saved;
      if (one_row) {
        decoding_.push_back(candidate);
        planned_cells_ += 1;
        if (unified_) budget_ -= 1;
        return true;
      }
      if (plan_chunk(candidate, std::max(admission.prefix_length, num_saved), alone) > 0) {
        return true;
      }
      planned_cells_ -= num_saved;
      return false;
    };
    if (!has_rows()) {
      kept_.resize(num_kept);
      taken_.resize(num_taken);
      return false;
    }
    num_sequences_ += 1 + candidate->num_forks;
    plan_.admissions.push_back(admission);
    return true;
  }

  // A cached slot is taken over where all of it is wanted; in streams, where a copy moves a whole
  // stream, always.
  [[nodiscard]] bool may_take_over(const PrefixMatch& match) const {
    return match.slot >= 0 && match.is_cached &&
           !state_.pinned[static_cast<std::size_t>(match.slot)] && !contains(kept_, match.slot) &&
           (!unified_ || match.length == state_.kv.length(match.slot));
  }

  // The lowest free slot (ids stay dense, which streams need), else one that is emptied for it.
  SeqId take_slot() {
    for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
      const bool is_free =
          state_.kv.state(slot) == KvTree::SlotState::kFree || contains(removed_, slot);
      if (is_free && !contains(taken_, slot)) {
        taken_.push_back(slot);
        return slot;
      }
    }
    if (!evict_one()) return -1;
    taken_.push_back(plan_.evictions.back());
    return taken_.back();
  }

  void build_micro_batches() {
    if (!decoding_.empty()) add_decoding();
    if (unified_) {
      // One call for all: prefill rows ride along in the matrix products of the decode rows.
      for (const PlannedRows& rows : prefill_) {
        if (plan_.micro_batches.empty()) plan_.micro_batches.emplace_back();
        plan_.micro_batches.back().rows.push_back(rows);
      }
      return;
    }
    // Streams are split into rectangles, so that a prompt beside others only makes more, smaller
    // calls: each prompt gets its own.
    for (const PlannedRows& rows : prefill_) {
      plan_.micro_batches.emplace_back().rows.push_back(rows);
    }
  }

  void add_decoding() {
    PlannedMicroBatch batch;
    std::sort(decoding_.begin(), decoding_.end(),
              [this](const Sequence* a, const Sequence* b) { return slot_of(a) < slot_of(b); });
    for (Sequence* sequence : decoding_) batch.rows.push_back({sequence, 1});
    plan_.micro_batches.push_back(std::move(batch));
  }

  [[nodiscard]] SeqId slot_of(const Sequence* sequence) const {
    if (sequence->slot >= 0) return sequence->slot;
    for (const Admission& admission : plan_.admissions) {
      if (admission.sequence == sequence) return admission.slot;
    }
    return -1;
  }

  const SchedulerConfig& config_;
  const SchedulerState& state_;
  const bool unified_;
  StepPlan plan_;
  std::vector<Sequence*> decoding_;
  std::vector<PlannedRows> prefill_;
  std::vector<SeqId> removed_;  // evicted and preempted: free once the plan is carried out
  std::vector<SeqId> kept_;     // in use, or the source of a copy
  std::vector<SeqId> taken_;    // promised to an admission
  std::int32_t num_sequences_ = 0;
  std::int32_t planned_cells_ = 0;
  std::int32_t budget_ = 0;
};

}  // namespace

StepPlan Scheduler::plan(const SchedulerState& state) const {
  return Planner(config_, state).plan();
}

SeqId Scheduler::choose_slot(const SchedulerState& state, std::span<const SeqId> keep) const {
  SeqId oldest = -1;
  for (SeqId slot = 0; slot < state.info.num_slots; ++slot) {
    const auto i = static_cast<std::size_t>(slot);
    if (state.kv.state(slot) == KvTree::SlotState::kFree) return slot;
    if (state.kv.state(slot) != KvTree::SlotState::kCached || state.pinned[i]) continue;
    if (contains(keep, slot)) continue;
    if (oldest < 0 || state.last_used[i] < state.last_used[static_cast<std::size_t>(oldest)]) {
      oldest = slot;
    }
  }
  return oldest;
}

}  // namespace batchcore
