// Sequences that wait for a slot, in the order in which they are admitted. Not thread-safe: the
// engine thread owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "core/sequence.h"

namespace batchcore {

class WaitingQueue {
 public:
  /// A preempted sequence is pushed with the rank that it came with, and so keeps its place.
  void push(Sequence* sequence) {
    by_rank_.emplace(sequence->rank, sequence);
    num_tokens_ += sequence->num_tokens();
  }

  /// False where it was not in the queue.
  bool erase(const Sequence* sequence) {
    if (by_rank_.erase(sequence->rank) == 0) return false;
    num_tokens_ -= sequence->num_tokens();
    return true;
  }

  [[nodiscard]] bool empty() const { return by_rank_.empty(); }
  [[nodiscard]] std::size_t size() const { return by_rank_.size(); }
  [[nodiscard]] std::int64_t num_tokens() const { return num_tokens_; }

  /// In admission order; a step looks only at as many as it admits.
  [[nodiscard]] auto begin() const { return by_rank_.begin(); }
  [[nodiscard]] auto end() const { return by_rank_.end(); }

 private:
  std::map<Rank, Sequence*> by_rank_;
  std::int64_t num_tokens_ = 0;
};

}  // namespace batchcore
