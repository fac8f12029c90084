// Goes through a WaitingQueue in admission order as if those that it was told of had been admitted
// and charged for, without changing it. Costs as much as it goes through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/waiting_queue.h"

namespace batchcore {

class QueueCursor {
 public:
  /// `only_preempted`: leaves out those that were never admitted.
  explicit QueueCursor(const WaitingQueue& queue, bool only_preempted = false);

  /// Who is next, nullptr at the end.
  Sequence* next();
  /// The user of the last one is charged from here on.
  void charge(double cost);
  /// The user of the last one is asked no more in this tier.
  void leave_user();
  /// Nor is anybody of that group.
  void leave_group(std::int32_t group);

 private:
  using Bucket = WaitingQueue::Bucket;
  using UserQueue = WaitingQueue::UserQueue;
  // Where a bucket of the present tier is looked at.
  struct BucketPlace {
    const Bucket* bucket;
    std::int32_t group;
    std::map<Rank, Sequence*>::const_iterator preempted;
    std::set<WaitingQueue::Standing>::const_iterator user;
  };
  // A user whose sequences are being looked at: all before `at` were.
  struct UserPlace {
    const UserQueue* queue;
    std::int32_t group;
    std::map<WaitingQueue::Place, Sequence*>::const_iterator at;
    double counter;  // with what it was charged here
  };

  bool enter_tier();
  Sequence* next_preempted();
  Sequence* next_of_users();
  [[nodiscard]] bool is_left(std::int32_t group) const;

  const WaitingQueue& queue_;
  const bool only_preempted_;
  std::map<WaitingQueue::BucketKey, Bucket>::const_iterator next_bucket_;
  std::vector<BucketPlace> buckets_;
  std::vector<UserPlace> users_;
  std::vector<std::pair<UserId, double>> charged_;
  std::vector<std::int32_t> left_groups_;
  UserId last_user_ = 0;
};

}  // namespace batchcore
