// Works out one plan: what the state would be after each decision is kept here, the state stays as
// it is. Internal to Scheduler::plan(); lives for one plan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/scheduler.h"
#include "core/scheduler_state.h"
#include "core/step_plan.h"

namespace batchcore {

// A prefix shorter than this is computed again rather than copied between streams, which moves a
// whole stream's buffer.
inline constexpr std::int32_t kMinStreamCopy = 64;

/// What was decided so far; copied where a decision may have to be taken back.
struct PlanDraft {
  StepPlan plan_;
  std::vector<Sequence*> decoding_;
  std::vector<PlannedRows> prefill_;
  std::vector<SeqId> removed_;  // evicted and preempted: free once the plan is carried out
  std::vector<SeqId> kept_;     // in use, or the source of a copy
  std::vector<SeqId> taken_;    // promised to an admission
  std::vector<std::int32_t> running_by_group_;
  std::int32_t num_sequences_ = 0;
  std::int32_t planned_cells_ = 0;
  std::int32_t budget_ = 0;     // prompt tokens that the step should still take
  std::int32_t rows_left_ = 0;  // that it could
};

class Planner : private PlanDraft {
 public:
  Planner(const SchedulerConfig& config, const TierLimits& tiers, const SchedulerState& state);

  StepPlan plan(bool admits);

 private:
  // planner.cpp: cells, and who computes what.
  [[nodiscard]] bool is_preempted(const Sequence* sequence) const {
    return std::find(plan_.preemptions.begin(), plan_.preemptions.end(), sequence) !=
           plan_.preemptions.end();
  }
  [[nodiscard]] bool is_admitted(const Sequence* sequence) const {
    return std::any_of(plan_.admissions.begin(), plan_.admissions.end(),
                       [&](const Admission& one) { return one.sequence == sequence; });
  }
  [[nodiscard]] bool is_cached(SeqId slot) const {
    return slot >= 0 && state_.kv.state(slot) == KvTree::SlotState::kCached;
  }
  [[nodiscard]] bool is_pinned(SeqId slot) const {
    return slot >= 0 && state_.pinned[static_cast<std::size_t>(slot)];
  }
  [[nodiscard]] bool is_alone() const { return decoding_.empty() && prefill_.empty(); }
  [[nodiscard]] std::int32_t free_cells() const;
  bool secure_cells(std::int32_t cells, const Sequence* requester);
  [[nodiscard]] bool is_only(const Sequence& sequence) const;
  bool evict_one(bool even_pinned);
  void count(const Sequence& sequence, std::int32_t sign);
  enum class Cells { kFreed, kKept };
  void preempt(Sequence* victim, Cells cells = Cells::kFreed);
  bool preempt_one_behind(const Sequence& requester);
  void choose_decoding(bool in_lock_step);
  [[nodiscard]] std::int32_t whole_groups(std::int32_t count, std::int32_t others) const;
  [[nodiscard]] std::int32_t prefill_budget() const;
  [[nodiscard]] double usual_step(const StepWork& now) const;
  std::int32_t plan_chunk(Sequence* sequence, std::int32_t num_computed, bool may_preempt);
  void continue_prefill();

  // planner_admission.cpp: who gets a slot.
  [[nodiscard]] std::int32_t free_slots() const;
  [[nodiscard]] Sequence* last_in_worse_tier(std::int32_t priority) const;
  [[nodiscard]] bool may_take_slots(std::int32_t priority) const;
  void admit();
  [[nodiscard]] std::unordered_map<UserId, std::int32_t> slots_by_user(std::int32_t tier) const;
  [[nodiscard]] Sequence* last_of_largest_user(
      const Sequence& candidate, const std::unordered_map<UserId, std::int32_t>& slots) const;
  void level_slots();
  template <typename NextVictim>
  bool take_slots_for(Sequence* candidate, const NextVictim& next_victim);
  template <typename NextVictim>
  bool take_slots_for(Sequence* candidate, const NextVictim& next_victim, Cells cells);
  bool try_admit(Sequence* candidate, const PrefixMatch& match);

  // planner_placement.cpp: where it goes, and what it starts from.
  [[nodiscard]] std::int32_t expected_tokens(const Sequence& sequence) const;
  [[nodiscard]] bool fits_in_future(const Sequence& candidate, const PrefixMatch& prefix) const;
  [[nodiscard]] bool is_worth_waiting(const Sequence& candidate, std::int32_t have) const;
  [[nodiscard]] PrefixMatch find_prefix(const Sequence& sequence) const;
  [[nodiscard]] HostCache::Match find_host_prefix(const Sequence& sequence,
                                                  std::int32_t have) const;
  bool place(Sequence* candidate, const PrefixMatch& match, std::int32_t num_restored = 0,
             std::int32_t num_cells = 0);
  [[nodiscard]] bool may_take_over(const PrefixMatch& match) const;
  SeqId take_slot();

  // planner_shapes.cpp: which calls.
  void build_micro_batches();
  [[nodiscard]] std::int32_t most_joint_rows() const;
  [[nodiscard]] std::int32_t preferred(std::int32_t rows) const {
    return state_.call_times.preferred(rows, state_.info.row_group);
  }
  void add_decoding();
  void find_fillable();
  void add_rider(Sequence* sequence);
  std::uint8_t& fillable(SeqId slot) { return fillable_[static_cast<std::size_t>(slot)]; }
  Sequence*& rider(SeqId slot) { return rider_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] bool is_fillable(SeqId slot) const {
    const auto i = static_cast<std::size_t>(slot);
    return fillable_[i] != 0 || rider_[i] != nullptr;
  }
  void bridge_gap(PlannedMicroBatch& batch, SeqId before, SeqId after);
  void add_filler(PlannedMicroBatch& batch, SeqId slot);
  [[nodiscard]] std::int32_t fillers_wanted(const PlannedMicroBatch& batch,
                                            std::int32_t rows) const;
  void fill_up(PlannedMicroBatch& batch);
  void add_outputs(PlannedMicroBatch& batch);
  void add_prompts_beside();
  void add_prompts_around();
  [[nodiscard]] bool rides(const Sequence* sequence) const;
  [[nodiscard]] std::int32_t num_planned(const Sequence* sequence) const;
  [[nodiscard]] bool is_last(const PlannedRows& rows) const;
  [[nodiscard]] std::int32_t pending_after_admission(const Sequence* sequence) const;
  [[nodiscard]] std::vector<SeqId> slots_to_fill(const PlannedMicroBatch& batch,
                                                 std::int32_t wanted) const;
  [[nodiscard]] SeqId slot_of(const Sequence* sequence) const;

  // planner_drafts.cpp: rows for tokens that are only guessed.
  void add_drafts();

  [[nodiscard]] bool is_removed(SeqId slot) const {
    return std::find(removed_.begin(), removed_.end(), slot) != removed_.end();
  }

  const SchedulerConfig& config_;
  const TierLimits& tiers_;
  const SchedulerState& state_;
  const bool unified_;
  std::vector<std::uint8_t> fillable_;   // slots that may get a dummy row
  std::vector<Sequence*> rider_;         // by slot: a prompt that may get a row there instead
  std::vector<const Sequence*> riding_;  // those that do
};

}  // namespace batchcore
