// How many sequences of a tier may run, and how many slots are kept free for it. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace batchcore {

struct TierLimit {
  std::int32_t tier = 0;           ///< a priority
  std::int32_t max_num_seqs = 0;   ///< that may run at a time, 0 = no limit of its own
  std::int32_t reserved_seqs = 0;  ///< slots that no worse tier may take
};

/// Limits go by the priority that a request came with: waiting long changes the order, never the
/// limits. Tiers between two that have limits are alike, so all are one of 2k+1 groups.
class TierLimits {
 public:
  /// Throws ConfigError where no request of some tier could ever run.
  TierLimits(std::vector<TierLimit> limits, std::int32_t max_num_seqs);

  /// Groups are numbered from the best tiers to the worst.
  [[nodiscard]] std::int32_t group_of(std::int32_t tier) const;
  [[nodiscard]] std::int32_t num_groups() const {
    return 2 * static_cast<std::int32_t>(limits_.size()) + 1;
  }

  /// Sequences of a group that may run where `running` do (by group) and `room` have a place in
  /// all: at most what its tier's limit and the free slots of better tiers leave. May be negative.
  [[nodiscard]] std::int32_t room_for(std::int32_t group, std::span<const std::int32_t> running,
                                      std::int32_t room) const;
  /// The most that could run of a group were the engine empty.
  [[nodiscard]] std::int32_t most_of(std::int32_t group) const;

 private:
  std::vector<TierLimit> limits_;  // best tier first
  std::int32_t max_num_seqs_;
};

}  // namespace batchcore
