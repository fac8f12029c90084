#include <algorithm>
#include <cstdint>
#include <unordered_map>

#include "core/planner.h"
#include "core/queue_cursor.h"

namespace batchcore {
namespace {

// Waiting sequences that are looked at behind one that waits for its prefix: of its user, and in
// all.
constexpr int kMaxLookahead = 16;
constexpr int kMaxLookaheadInAll = 64;
constexpr std::int32_t kAnyRoom = 1 << 30;

}  // namespace

// One request always gets in, or a small batch size could lock out one with many completions.
std::int32_t Planner::free_slots() const {
  if (num_sequences_ == 0) return config_.max_num_seqs;
  return std::min(config_.max_num_seqs, state_.batch_size_limit) - num_sequences_;
}

// Running, and not preempted too often to be once more.
Sequence* Planner::last_in_worse_tier(std::int32_t priority) const {
  for (auto at = state_.running.rbegin(); at != state_.running.rend(); ++at) {
    Sequence* sequence = *at;
    if (sequence->rank.priority <= priority) break;  // as are all before it
    if (sequence->effective_tier() > priority &&
        sequence->num_preemptions < config_.max_preemptions && !is_preempted(sequence)) {
      return sequence;
    }
  }
  return nullptr;
}

bool Planner::may_take_slots(std::int32_t priority) const {
  return config_.preempt_for_slots && !state_.is_paused && last_in_worse_tier(priority) != nullptr;
}

void Planner::admit() {
  const WaitingQueue& waiting = state_.waiting;
  if (waiting.empty() || (state_.is_paused && waiting.num_preempted() == 0)) return;
  // Under load this is most steps: nobody is looked at who can't get in.
  if (free_slots() <= 0 && !may_take_slots(waiting.best_priority())) return;
  QueueCursor cursor(waiting, state_.is_paused);
  std::unordered_map<UserId, int> skipped_of;
  int skipped = 0;
  bool is_full = false;  // somebody waits for slots: nobody may take those that are free
  while (Sequence* candidate = cursor.next()) {
    const std::int32_t group = candidate->tier_group;
    const std::int32_t size = 1 + candidate->num_forks;
    const bool has_room =
        !is_full && tiers_.room_for(group, running_by_group_, free_slots()) >= size;
    if (!has_room) {
      const bool is_limited = tiers_.room_for(group, running_by_group_, kAnyRoom) < size;
      const bool takes = !is_limited && may_take_slots(candidate->rank.priority);
      if (is_limited || (!takes && !is_full && free_slots() >= size)) {
        cursor.leave_group(group);  // at its limit, or what is free is reserved for better ones
        continue;
      }
      if (!takes) {
        is_full = true;
        if (!may_take_slots(waiting.best_priority()) || ++skipped > kMaxLookahead) return;
        continue;
      }
    }
    const PrefixMatch match = find_prefix(*candidate);
    if (config_.prefix_caching && candidate->num_saved == 0 &&
        is_worth_waiting(*candidate, match.length)) {
      if (++skipped > kMaxLookaheadInAll) return;
      if (++skipped_of[candidate->user] >= kMaxLookahead) cursor.leave_user();
      continue;
    }
    if (has_room ? !try_admit(candidate, match) : !take_slots_for(candidate)) return;
    if (candidate->num_preemptions > 0) continue;  // it was charged when it came in first
    const std::int32_t to_compute =
        candidate->num_prompt_tokens - plan_.admissions.back().prefix_length;
    cursor.charge(waiting.users().config().prompt_token_cost * to_compute);
  }
}

// Admits `candidate` on slots of worse tiers, who ranks last first. The batch gets no larger by it.
// False, and nothing changed, where that is not enough.
bool Planner::take_slots_for(Sequence* candidate) {
  const PlanDraft before = *this;
  const std::int32_t most = num_sequences_ + std::max(free_slots(), 0);
  while (tiers_.room_for(candidate->tier_group, running_by_group_, most - num_sequences_) <
         1 + candidate->num_forks) {
    Sequence* victim = last_in_worse_tier(candidate->rank.priority);
    if (victim == nullptr) {
      PlanDraft::operator=(before);
      return false;
    }
    preempt(victim);
    plan_.num_slot_preemptions += 1;
  }
  if (try_admit(candidate, find_prefix(*candidate))) return true;
  PlanDraft::operator=(before);
  return false;
}

// False where nobody behind this one may be admitted either.
bool Planner::try_admit(Sequence* candidate, const PrefixMatch& match) {
  if (candidate->num_saved > 0) {
    return place(candidate, {}, candidate->num_saved, candidate->num_saved);
  }
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

}  // namespace batchcore
