#include "core/queue_cursor.h"

#include <algorithm>
#include <tuple>

namespace batchcore {

QueueCursor::QueueCursor(const WaitingQueue& queue, bool only_preempted)
    : queue_(queue), only_preempted_(only_preempted), next_bucket_(queue.buckets_.begin()) {}

bool QueueCursor::is_left(std::int32_t group) const {
  return std::find(left_groups_.begin(), left_groups_.end(), group) != left_groups_.end();
}

// The buckets of the next effective tier. False at the end.
bool QueueCursor::enter_tier() {
  buckets_.clear();
  users_.clear();
  if (next_bucket_ == queue_.buckets_.end()) return false;
  const std::int32_t tier = next_bucket_->first.first;
  for (; next_bucket_ != queue_.buckets_.end() && next_bucket_->first.first == tier;
       ++next_bucket_) {
    const Bucket& bucket = next_bucket_->second;
    const std::int32_t group = next_bucket_->first.second;
    if (is_left(group)) continue;
    buckets_.push_back({&bucket, group, bucket.preempted.begin(), bucket.order.begin()});
  }
  return true;
}

Sequence* QueueCursor::next() {
  for (;;) {
    Sequence* sequence = next_preempted();
    if (sequence == nullptr && !only_preempted_) sequence = next_of_users();
    if (sequence != nullptr) {
      last_user_ = sequence->user;
      return sequence;
    }
    if (!enter_tier()) return nullptr;
  }
}

Sequence* QueueCursor::next_preempted() {
  BucketPlace* first = nullptr;
  for (BucketPlace& place : buckets_) {
    if (place.preempted == place.bucket->preempted.end()) continue;
    if (first == nullptr || place.preempted->first < first->preempted->first) first = &place;
  }
  return first == nullptr ? nullptr : (first->preempted++)->second;
}

Sequence* QueueCursor::next_of_users() {
  for (;;) {
    auto known = users_.end();
    const auto order_of = [](const UserPlace& place) {
      return std::tuple(place.counter, place.at->first.arrival, place.at->first.index);
    };
    for (auto place = users_.begin(); place != users_.end(); ++place) {
      if (known == users_.end() || order_of(*place) < order_of(*known)) known = place;
    }
    BucketPlace* fresh = nullptr;
    for (BucketPlace& place : buckets_) {
      if (place.user == place.bucket->order.end()) continue;
      if (fresh == nullptr || *place.user < *fresh->user) fresh = &place;
    }
    if (fresh != nullptr &&
        (known == users_.end() || std::tuple(fresh->user->counter, fresh->user->arrival,
                                             fresh->user->index) < order_of(*known))) {
      // With what it was charged here it may come later than the queue says: so it is compared once
      // more.
      const UserQueue& queue = *(fresh->user++)->queue;
      double counter = queue.counter;
      for (const auto& [user, share] : charged_) counter += user == queue.user ? share : 0.0;
      users_.push_back({&queue, fresh->group, queue.sequences.begin(), counter});
      continue;
    }
    if (known == users_.end()) return nullptr;
    Sequence* sequence = (known->at++)->second;
    if (known->at == known->queue->sequences.end()) users_.erase(known);
    return sequence;
  }
}

void QueueCursor::charge(double cost) {
  const double share = queue_.users_.share_of(last_user_, cost);
  charged_.emplace_back(last_user_, share);
  for (UserPlace& place : users_) {
    if (place.queue->user == last_user_) place.counter += share;
  }
}

void QueueCursor::leave_user() {
  std::erase_if(users_, [this](const UserPlace& place) { return place.queue->user == last_user_; });
}

void QueueCursor::leave_group(std::int32_t group) {
  left_groups_.push_back(group);
  std::erase_if(buckets_, [group](const BucketPlace& place) { return place.group == group; });
  std::erase_if(users_, [group](const UserPlace& place) { return place.group == group; });
}

}  // namespace batchcore
