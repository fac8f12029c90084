#include "core/waiting_queue.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace batchcore {
namespace {

// A step must not stand still because ten thousand came at once and age at once.
constexpr int kMaxLifts = 256;

}  // namespace

WaitingQueue::WaitingQueue(QueueConfig config)
    : config_(std::move(config)), users_(config_.fair_share) {}

WaitingQueue::Place WaitingQueue::place_of(const Sequence& sequence) {
  // Otherwise a user's requests without a deadline would never run beside ever new ones with one.
  const double deadline =
      sequence.has_aged ? -std::numeric_limits<double>::infinity() : sequence.deadline;
  return {deadline, sequence.rank.arrival, sequence.rank.index};
}

WaitingQueue::Standing WaitingQueue::standing_of(UserQueue& queue) {
  const Place& head = queue.sequences.begin()->first;
  return {queue.counter, head.arrival, head.index, &queue};
}

void WaitingQueue::push(Sequence* sequence, double now) {
  insert(sequence);
  num_sequences_ += 1;
  num_preempted_ += is_preempted(*sequence) ? 1 : 0;
  num_tokens_ += sequence->num_tokens();
  priorities_[sequence->rank.priority] += 1;
  if (config_.aging_s <= 0.0) return;
  sequence->lifts_at = now + config_.aging_s;
  lifts_.emplace(std::pair(sequence->lifts_at, sequence->rank), sequence);
}

bool WaitingQueue::erase(Sequence* sequence) {
  if (!remove(*sequence)) return false;
  num_sequences_ -= 1;
  num_preempted_ -= is_preempted(*sequence) ? 1 : 0;
  num_tokens_ -= sequence->num_tokens();
  const auto count = priorities_.find(sequence->rank.priority);
  if (--count->second == 0) priorities_.erase(count);
  if (config_.aging_s > 0.0) lifts_.erase({sequence->lifts_at, sequence->rank});
  return true;
}

void WaitingQueue::insert(Sequence* sequence) {
  Bucket& bucket = buckets_[key_of(*sequence)];
  if (is_preempted(*sequence)) {
    bucket.preempted.emplace(sequence->rank, sequence);
    return;
  }
  const UserId user = sequence->user;
  UserQueue& queue = bucket.queues[user];
  if (queue.sequences.empty()) {
    queue.user = user;
    queue.counter = users_.counter(user);
    const auto index = static_cast<std::size_t>(user);
    if (queues_of_.size() <= index) queues_of_.resize(index + 1);
    queues_of_[index].emplace_back(&bucket, &queue);
  } else {
    bucket.order.erase(standing_of(queue));
  }
  queue.sequences.emplace(place_of(*sequence), sequence);
  bucket.order.insert(standing_of(queue));
}

bool WaitingQueue::remove(const Sequence& sequence) {
  const auto found = buckets_.find(key_of(sequence));
  if (found == buckets_.end()) return false;
  Bucket& bucket = found->second;
  if (is_preempted(sequence)) {
    if (bucket.preempted.erase(sequence.rank) == 0) return false;
  } else {
    const auto of_user = bucket.queues.find(sequence.user);
    if (of_user == bucket.queues.end()) return false;
    UserQueue& queue = of_user->second;
    const auto at = queue.sequences.find(place_of(sequence));
    if (at == queue.sequences.end()) return false;
    bucket.order.erase(standing_of(queue));
    queue.sequences.erase(at);
    if (!queue.sequences.empty()) {
      bucket.order.insert(standing_of(queue));
    } else {
      std::erase(queues_of_[static_cast<std::size_t>(sequence.user)], std::pair(&bucket, &queue));
      bucket.queues.erase(of_user);
    }
  }
  if (bucket.preempted.empty() && bucket.queues.empty()) buckets_.erase(found);
  return true;
}

void WaitingQueue::age(double now) {
  for (int i = 0; i < kMaxLifts && !lifts_.empty() && lifts_.begin()->first.first <= now; ++i) {
    auto node = lifts_.extract(lifts_.begin());
    Sequence* sequence = node.mapped();
    const bool rises = sequence->effective_tier() > best_priority();
    if (rises || !sequence->has_aged) {
      remove(*sequence);
      sequence->has_aged = true;
      sequence->lift += rises ? 1 : 0;
      insert(sequence);
    }
    sequence->lifts_at += config_.aging_s;
    node.key().first = sequence->lifts_at;
    lifts_.insert(std::move(node));
  }
}

void WaitingQueue::charge(UserId user, double cost) {
  users_.charge(user, cost);
  const auto index = static_cast<std::size_t>(user);
  if (index >= queues_of_.size()) return;
  for (const auto& [bucket, queue] : queues_of_[index]) {
    auto node = bucket->order.extract(standing_of(*queue));
    queue->counter = users_.counter(user);
    node.value() = standing_of(*queue);
    bucket->order.insert(std::move(node));
  }
}

std::optional<std::string> WaitingQueue::check_integrity() const {
  std::size_t num_sequences = 0;
  std::size_t num_preempted = 0;
  std::size_t num_queues = 0;
  std::int64_t num_tokens = 0;
  std::map<std::int32_t, std::size_t> priorities;
  const auto count = [&](const Sequence& sequence) {
    num_sequences += 1;
    num_tokens += sequence.num_tokens();
    priorities[sequence.rank.priority] += 1;
  };
  for (const auto& [key, bucket] : buckets_) {
    if (bucket.preempted.empty() && bucket.queues.empty()) return "an empty tier is kept";
    if (bucket.order.size() != bucket.queues.size()) return "a user is not in the order of users";
    for (const auto& [rank, sequence] : bucket.preempted) {
      if (key_of(*sequence) != key) return "a preempted sequence waits in another tier";
      count(*sequence);
      num_preempted += 1;
    }
    for (const Standing& standing : bucket.order) {
      const UserQueue& queue = *standing.queue;
      if (standing.counter != users_.counter(queue.user)) return "a user's counter is out of date";
      if (standing.arrival != queue.sequences.begin()->first.arrival) return "a head is not first";
      for (const auto& [place, sequence] : queue.sequences) {
        if (key_of(*sequence) != key) return "a sequence waits in another tier";
        count(*sequence);
      }
    }
    num_queues += bucket.queues.size();
  }
  std::size_t num_listed = 0;
  for (const auto& queues : queues_of_) num_listed += queues.size();
  if (num_listed != num_queues) return "a user's queues are counted wrongly";
  if (num_sequences != num_sequences_ || num_preempted != num_preempted_ ||
      num_tokens != num_tokens_ || priorities != priorities_) {
    return "the waiting queue is counted wrongly";
  }
  if (config_.aging_s > 0.0 && lifts_.size() != num_sequences_) {
    return "a waiting sequence does not age";
  }
  return users_.check_integrity();
}

}  // namespace batchcore
