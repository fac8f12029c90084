// Sequences that wait for a slot, in the order in which they are admitted: the best tier first; in
// it those that were preempted, by rank; then the user who got least; of a user's those that have
// waited long, by arrival; then the earliest deadline. Not thread-safe: the engine thread owns it.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/fair_share.h"
#include "core/sequence.h"

namespace batchcore {

struct QueueConfig {
  /// Seconds of waiting that count as one tier, 0 = any time counts nothing. Nobody is lifted above
  /// the best tier that others wait in, so that aging doesn't undo the fair share inside it.
  double aging_s = 0.0;
  FairShareConfig fair_share;
};

class QueueCursor;

class WaitingQueue {
 public:
  explicit WaitingQueue(QueueConfig config = {});
  WaitingQueue(const WaitingQueue&) = delete;
  WaitingQueue& operator=(const WaitingQueue&) = delete;

  /// What a sequence gained by waiting it keeps; its clock starts anew.
  void push(Sequence* sequence, double now = 0.0);
  /// False where it was not in the queue.
  bool erase(Sequence* sequence);
  /// Lifts those whose time has come; a bounded number, the rest with the next calls.
  void age(double now);

  UserId enter(const std::string& user) { return users_.enter(user); }
  void leave(UserId user) { users_.leave(user); }
  void charge(UserId user, double cost);
  [[nodiscard]] const FairShare& users() const { return users_; }

  [[nodiscard]] bool empty() const { return num_sequences_ == 0; }
  [[nodiscard]] std::size_t size() const { return num_sequences_; }
  [[nodiscard]] std::size_t num_preempted() const { return num_preempted_; }
  [[nodiscard]] std::int64_t num_tokens() const { return num_tokens_; }
  /// Lowest priority number that waits; not of an empty queue.
  [[nodiscard]] std::int32_t best_priority() const { return priorities_.begin()->first; }
  /// Sequences by priority, lowest first.
  [[nodiscard]] const std::map<std::int32_t, std::size_t>& by_priority() const {
    return priorities_;
  }

  /// Recounts everything; a sentence that says what is wrong, or nothing.
  [[nodiscard]] std::optional<std::string> check_integrity() const;

 private:
  friend class QueueCursor;

  // Order among the sequences of one user.
  struct Place {
    double deadline;
    std::uint64_t arrival;
    std::int32_t index;
    auto operator<=>(const Place&) const = default;
  };
  struct UserQueue {
    UserId user = 0;
    double counter = 0.0;  // the user's, as it is in Bucket::order
    std::map<Place, Sequence*> sequences;
  };
  // Order among users: least served, then whose head came first.
  struct Standing {
    double counter;
    std::uint64_t arrival;
    std::int32_t index;
    UserQueue* queue;
    auto operator<=>(const Standing&) const = default;
  };
  // Those of one effective tier that are limited alike.
  struct Bucket {
    std::map<Rank, Sequence*> preempted;
    std::unordered_map<UserId, UserQueue> queues;
    std::set<Standing> order;
  };
  using BucketKey = std::pair<std::int32_t, std::int32_t>;  // effective tier, limit group

  static Place place_of(const Sequence& sequence);
  static Standing standing_of(UserQueue& queue);
  static BucketKey key_of(const Sequence& sequence) {
    return {sequence.effective_tier(), sequence.tier_group};
  }
  static bool is_preempted(const Sequence& sequence) { return sequence.num_preemptions > 0; }
  void insert(Sequence* sequence);
  bool remove(const Sequence& sequence);

  QueueConfig config_;
  FairShare users_;
  std::map<BucketKey, Bucket> buckets_;
  std::vector<std::vector<std::pair<Bucket*, UserQueue*>>> queues_of_;  // by user
  std::map<std::pair<double, Rank>, Sequence*> lifts_;                  // by Sequence::lifts_at
  std::map<std::int32_t, std::size_t> priorities_;
  std::size_t num_sequences_ = 0;
  std::size_t num_preempted_ = 0;
  std::int64_t num_tokens_ = 0;
};

}  // namespace batchcore
