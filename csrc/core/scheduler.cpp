#include "core/scheduler.h"

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "core/eviction.h"

namespace batchcore {
namespace {

// Prefill chunks in tokens, large enough that prefill keeps most of its throughput
// (docs/design.md has the measurement).
constexpr std::int32_t kMinChunkLatency = 16;
constexpr std::int32_t kMinChunkBalanced = 64;
// Steps with prefill may take this multiple of a step without, where no target is given.
constexpr double kDefaultSlowdown = 2.5;
// A prefix shorter than this is computed again rather than copied between streams, which moves a
// whole stream's buffer; and nobody waits for another sequence to compute less than this.
constexpr std::int32_t kMinStreamCopy = 64;
constexpr std::int32_t kMinWorthWaiting = 32;
// Nor is less than this restored from host memory.
constexpr std::int32_t kMinHostTokens = 64;
// In streams, idle slots between busy ones that are cheaper filled than cut out: a second call
// costs as much as six rows.
constexpr std::int32_t kMaxGap = 6;
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
    choose_decoding(true);
    budget_ = prefill_budget();
    continue_prefill();
    admit();
    // A static batch that is larger than what fits would wait for itself.
    if (is_alone()) choose_decoding(false);
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

  [[nodiscard]] bool is_pinned(SeqId slot) const {
    return slot >= 0 && state_.pinned[static_cast<std::size_t>(slot)];
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
      if (evict_one(false)) continue;
      if (requester == nullptr) return false;
      if (preempt_one_behind(*requester)) continue;
      // Pinned prefixes give way to the one sequence that could not go on otherwise.
      if (!is_only(*requester) || !evict_one(true)) return false;
    }
    return true;
  }

  // True where nobody else runs after this plan.
  [[nodiscard]] bool is_only(const Sequence& sequence) const {
    return std::all_of(state_.running.begin(), state_.running.end(), [&](const Sequence* other) {
      return other == &sequence || is_preempted(other);
    });
  }

  bool evict_one(bool even_pinned) {
    const SeqId slot = least_worth(state_, kept_, removed_, even_pinned);
    if (slot < 0) return false;
    plan_.evictions.push_back(slot);
    removed_.push_back(slot);
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
  void choose_decoding(bool in_lock_step) {
    for (Sequence* sequence : state_.running) {
      if (!sequence->is_decoding() || is_preempted(sequence)) continue;
      if (in_lock_step && sequence->has_started && sequence->batch->is_prefilling()) continue;
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

  // The most that is not above `count` and completes a row group together with `others`.
  [[nodiscard]] std::int32_t whole_groups(std::int32_t count, std::int32_t others) const {
    const std::int32_t over = (count + others) % RowShapes::kGroup;
    return count > over ? count - over : count;
  }

  [[nodiscard]] std::int32_t prefill_budget() const {
    const auto rows = static_cast<std::int32_t>(decoding_.size());
    const std::int32_t most = unified_ ? state_.info.n_ubatch - rows : state_.info.n_ubatch;
    if (rows == 0 || config_.prefill_policy == PrefillPolicy::kThroughput) return most;
    const std::int32_t floor = std::min(
        config_.prefill_policy == PrefillPolicy::kLatency ? kMinChunkLatency : kMinChunkBalanced,
        most);
    if (!state_.cost.is_ready()) return whole_groups(floor, unified_ ? rows : 0);
    StepWork work{0, rows, 0};
    for (const Sequence* sequence : decoding_) work.kv_tokens += sequence->num_tokens();
    const double alone = state_.cost.seconds(work);
    const double target =
        config_.target_itl_s > 0 ? config_.target_itl_s : alone * kDefaultSlowdown;
    const double per_token = state_.cost.seconds_per_prefill_token();
    const double left = per_token > 0 ? (target - alone) / per_token : most;
    const auto chunk = static_cast<std::int32_t>(std::clamp(left, 0.0, static_cast<double>(most)));
    return whole_groups(std::clamp(chunk, floor, most), unified_ ? rows : 0);
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

  [[nodiscard]] PrefixMatch find_prefix(const Sequence& sequence) const {
    if (!config_.prefix_caching) return {};
    // The last token is always computed: its logits are what the step is for.
    const std::span<const Token> prompt(sequence.tokens.data(), sequence.tokens.size() - 1);
    const PrefixMatch match = state_.kv.longest_match(prompt, state_.serves_whole_slots_only());
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

  // A prefix in host memory that goes far enough beyond what a slot holds to be worth the copy.
  [[nodiscard]] HostCache::Match find_host_prefix(const Sequence& sequence,
                                                  std::int32_t have) const {
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

  // False where nobody behind this one may be admitted either.
  bool try_admit(Sequence* candidate) {
    if (candidate->num_saved > 0) {
      return place(candidate, {}, candidate->num_saved, candidate->num_saved);
    }
    const PrefixMatch match = find_prefix(*candidate);
    if (config_.prefix_caching && is_worth_waiting(*candidate, match.length)) return true;
    const HostCache::Match host = find_host_prefix(*candidate, match.length);
    if (host.entry != nullptr) {
      // All cells of its state are needed at first, even where a part of them is dropped again.
      const auto cells = static_cast<std::int32_t>(host.entry->tokens.size());
      if (place(candidate, {}, host.length, cells)) {
        plan_.admissions.back().host = host.entry;
        plan_.admissions.back().prefix_length = host.length;
        return true;
      }
    }
    if (place(candidate, match)) return true;
    // Alone, it must get in: the slot that holds its prefix may be what takes up the room.
    return is_alone() && match.slot >= 0 && place(candidate, {});
  }

  [[nodiscard]] bool is_alone() const { return decoding_.empty() && prefill_.empty(); }

  // Gives `candidate` a slot that starts with `match`, or with `num_restored` tokens from a state
  // in host memory that needs `num_cells`, and its first rows. False, and nothing but evictions
  // planned, where there is no room.
  bool place(Sequence* candidate, const PrefixMatch& match, std::int32_t num_restored = 0,
             std::int32_t num_cells = 0) {
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
        if (unified_) budget_ -= 1;
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
    num_sequences_ += 1 + candidate->num_forks;
    plan_.admissions.push_back(admission);
    return true;
  }

  // A cached slot is taken over where all of it is wanted; in streams, where a copy moves a whole
  // stream, always.
  [[nodiscard]] bool may_take_over(const PrefixMatch& match) const {
    return match.slot >= 0 && match.is_cached && !is_pinned(match.slot) &&
           !contains(kept_, match.slot) &&
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
    if (!evict_one(is_alone())) return -1;
    taken_.push_back(plan_.evictions.back());
    return taken_.back();
  }

  void build_micro_batches() {
    find_fillable();
    if (!decoding_.empty()) add_decoding();
    for (const PlannedRows& rows : prefill_) {
      // Unified: one call for all, prefill rows ride along in the matrix products of the decode
      // rows. Streams are split into rectangles, so that a prompt beside others only makes more,
      // smaller calls: each prompt gets its own.
      if (plan_.micro_batches.empty() || !unified_) plan_.micro_batches.emplace_back();
      plan_.micro_batches.back().rows.push_back(rows);
    }
    for (PlannedMicroBatch& batch : plan_.micro_batches) complete_row_groups(batch);
  }

  void add_decoding() {
    PlannedMicroBatch batch;
    std::sort(decoding_.begin(), decoding_.end(),
              [this](const Sequence* a, const Sequence* b) { return slot_of(a) < slot_of(b); });
    SeqId before = -1;
    for (Sequence* sequence : decoding_) {
      const SeqId slot = slot_of(sequence);
      if (!unified_ && before >= 0) bridge_gap(batch, before, slot);
      batch.rows.push_back({sequence, 1});
      before = slot;
    }
    plan_.micro_batches.push_back(std::move(batch));
  }

  // A dummy row may go where it can be taken back: on an empty slot, or behind a prefix of a memory
  // that can be cut back.
  void find_fillable() {
    const bool can_cut = !state_.serves_whole_slots_only();
    fillable_.assign(static_cast<std::size_t>(state_.info.num_slots), 0);
    for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
      const KvTree::SlotState holds = state_.kv.state(slot);
      fillable(slot) = holds == KvTree::SlotState::kFree ||
                       (holds == KvTree::SlotState::kCached && can_cut &&
                        state_.kv.length(slot) < state_.info.cells_per_slot);
    }
    for (const SeqId slot : removed_) fillable(slot) = 1;
    for (const Sequence* sequence : state_.running) {
      if (!is_preempted(sequence)) fillable(sequence->slot) = 0;
    }
    for (const Admission& admission : plan_.admissions) fillable(admission.slot) = 0;
  }

  std::uint8_t& fillable(SeqId slot) { return fillable_[static_cast<std::size_t>(slot)]; }

  // llama.cpp cuts a batch over streams wherever the ids have a gap, and reads all weights once
  // more for each piece.
  void bridge_gap(PlannedMicroBatch& batch, SeqId before, SeqId after) {
    if (after - before - 1 > kMaxGap) return;
    for (SeqId slot = before + 1; slot < after; ++slot) {
      if (fillable(slot) == 0) return;
    }
    for (SeqId slot = before + 1; slot < after; ++slot) add_filler(batch, slot);
  }

  void add_filler(PlannedMicroBatch& batch, SeqId slot) {
    fillable(slot) = 0;
    batch.filler_slots.push_back(slot);
    planned_cells_ += unified_ ? 1 : 0;
  }

  // Where more rows are faster, dummy rows are added to a call that only decodes, and logits that
  // nobody asks for to one that prefills: there the output head is what sees few rows.
  void complete_row_groups(PlannedMicroBatch& batch) {
    auto count = static_cast<std::int32_t>(batch.filler_slots.size());
    std::int32_t outputs = count;
    for (const PlannedRows& rows : batch.rows) {
      count += rows.count;
      outputs += rows.count == pending_after_admission(rows.sequence) ? 1 : 0;
    }
    const std::int32_t wanted = state_.row_shapes.preferred(outputs) - outputs;
    if (wanted == 0 || outputs + wanted > state_.info.max_outputs) return;
    if (outputs < count) {
      batch.num_extra_outputs = std::min(wanted, count - outputs);
    } else if (count + wanted <= state_.info.n_ubatch) {
      add_fillers(batch, wanted);
      std::sort(batch.filler_slots.begin(), batch.filler_slots.end());
    }
  }

  [[nodiscard]] std::int32_t pending_after_admission(const Sequence* sequence) const {
    for (const Admission& admission : plan_.admissions) {
      if (admission.sequence != sequence) continue;
      return sequence->num_tokens() - std::max(admission.prefix_length, sequence->num_saved);
    }
    return sequence->num_pending();
  }

  // Up to `wanted` dummy rows: in streams on the slots next to the busy ones, so that ids stay free
  // of gaps.
  void add_fillers(PlannedMicroBatch& batch, std::int32_t wanted) {
    std::int32_t added = 0;
    if (unified_) {
      for (SeqId slot = 0; slot < state_.info.num_slots && added < wanted; ++slot) {
        if (fillable(slot) == 0 || free_cells() < 1) continue;
        add_filler(batch, slot);
        added += 1;
      }
      return;
    }
    SeqId above = slot_of(batch.rows.back().sequence) + 1;
    SeqId below = slot_of(batch.rows.front().sequence) - 1;
    for (; added < wanted && above < state_.info.num_slots && fillable(above) != 0; ++above) {
      add_filler(batch, above);
      added += 1;
    }
    for (; added < wanted && below >= 0 && fillable(below) != 0; --below) {
      add_filler(batch, below);
      added += 1;
    }
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
  std::vector<SeqId> removed_;          // evicted and preempted: free once the plan is carried out
  std::vector<SeqId> kept_;             // in use, or the source of a copy
  std::vector<SeqId> taken_;            // promised to an admission
  std::vector<std::uint8_t> fillable_;  // slots that may get a dummy row
  std::int32_t num_sequences_ = 0;
  std::int32_t planned_cells_ = 0;
  std::int32_t budget_ = 0;
};

}  // namespace

StepPlan Scheduler::plan(const SchedulerState& state) const {
  return Planner(config_, state).plan();
}

SeqId Scheduler::choose_slot(const SchedulerState& state) {
  for (SeqId slot = 0; slot < state.info.num_slots; ++slot) {
    if (state.kv.state(slot) == KvTree::SlotState::kFree) return slot;
  }
  return least_worth(state, {}, {}, true);
}

}  // namespace batchcore
