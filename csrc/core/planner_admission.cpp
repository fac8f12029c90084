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

// Admits `candidate` on slots of those that `next_victim` names. The batch gets no larger by it.
// Their cells stay where there is a slot to spare and room: then giving way costs next to nothing.
// False, and nothing changed, where that is not enough.
template <typename NextVictim>
bool Planner::take_slots_for(Sequence* candidate, const NextVictim& next_victim) {
  return (config_.prefix_caching && take_slots_for(candidate, next_victim, Cells::kKept)) ||
         take_slots_for(candidate, next_victim, Cells::kFreed);
}

template <typename NextVictim>
bool Planner::take_slots_for(Sequence* candidate, const NextVictim& next_victim, Cells cells) {
  const PlanDraft before = *this;
  const std::int32_t most = num_sequences_ + std::max(free_slots(), 0);
  while (tiers_.room_for(candidate->tier_group, running_by_group_, most - num_sequences_) <
         1 + candidate->num_forks) {
    Sequence* victim = next_victim();
    if (victim == nullptr) {
      PlanDraft::operator=(before);
      return false;
    }
    preempt(victim, cells);
    plan_.num_slot_preemptions += 1;
  }
  if (try_admit(candidate, find_prefix(*candidate))) return true;
  PlanDraft::operator=(before);
  return false;
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
    const auto next_victim = [&] { return last_in_worse_tier(candidate->rank.priority); };
    if (has_room ? !try_admit(candidate, match) : !take_slots_for(candidate, next_victim)) return;
    if (candidate->num_preemptions > 0) continue;  // it was charged when it came in first
    const std::int32_t to_compute =
        candidate->num_prompt_tokens - plan_.admissions.back().prefix_length;
    cursor.charge(waiting.users().config().prompt_token_cost * to_compute);
  }
}

// Slots of each user in a tier, as planned so far.
std::unordered_map<UserId, std::int32_t> Planner::slots_by_user(std::int32_t tier) const {
  std::unordered_map<UserId, std::int32_t> slots;
  const auto add = [&](const Sequence& one) {
    if (one.rank.priority == tier) slots[one.user] += 1 + one.num_forks;
  };
  for (const Sequence* one : state_.running) {
    if (!is_preempted(one)) add(*one);
  }
  for (const Admission& admission : plan_.admissions) add(*admission.sequence);
  return slots;
}

// Where a user whose turn it is has fewer slots than another, it need not wait for one of that
// user's sequences to end, which may take as long as an answer. Turns go by the counters, so what
// users get in the long run stays what those decide.
void Planner::level_slots() {
  const WaitingQueue& waiting = state_.waiting;
  const FairShare& users = waiting.users();
  if (waiting.size() == waiting.num_preempted() || !config_.preempt_for_slots || state_.is_paused ||
      free_slots() > 0 || users.num_active() < 2) {
    return;
  }
  const std::int32_t tier = waiting.best_priority();
  std::unordered_map<UserId, std::int32_t> slots = slots_by_user(tier);
  // What keeps this cheap where many wait and all have their share.
  double largest = 0.0;
  for (const auto& [user, held] : slots) {
    largest = std::max(largest, users.share_of(user, held - 1));
  }
  QueueCursor cursor(waiting);
  for (int looked_at = 0; looked_at < kMaxLookaheadInAll; ++looked_at) {
    Sequence* candidate = cursor.next();
    if (candidate == nullptr || candidate->rank.priority != tier) return;
    if (is_preempted(candidate) || is_admitted(candidate)) continue;
    cursor.leave_user();
    if (candidate->batch != nullptr || candidate->num_forks > 0 ||
        users.share_of(candidate->user, slots[candidate->user] + 1) > largest) {
      continue;
    }
    const auto victim = [&] { return last_of_largest_user(*candidate, slots); };
    if (victim() == nullptr || is_worth_waiting(*candidate, find_prefix(*candidate).length)) {
      continue;
    }
    if (!take_slots_for(candidate, victim)) return;
    slots = slots_by_user(tier);
  }
}

// Of whoever holds most slots for its weight: more than the candidate's user even after giving one
// to it, and was served no less.
Sequence* Planner::last_of_largest_user(
    const Sequence& candidate, const std::unordered_map<UserId, std::int32_t>& slots) const {
  const FairShare& users = state_.waiting.users();
  const auto found = slots.find(candidate.user);
  const std::int32_t held = found == slots.end() ? 0 : found->second;
  Sequence* best = nullptr;
  double most = users.share_of(candidate.user, held + 1);
  for (Sequence* one : state_.running) {
    if (one->rank.priority != candidate.rank.priority || one->user == candidate.user ||
        is_preempted(one) || one->batch != nullptr || one->num_forks > 0 ||
        one->num_preemptions >= config_.max_preemptions ||
        users.counter(one->user) < users.counter(candidate.user)) {
      continue;
    }
    const double left = users.share_of(one->user, slots.at(one->user) - 1);
    if (left < most) continue;
    best = one;  // ascending rank: the last
    most = left;
  }
  return best;
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
