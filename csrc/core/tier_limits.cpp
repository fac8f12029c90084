#include "core/tier_limits.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/errors.h"

namespace batchcore {

TierLimits::TierLimits(std::vector<TierLimit> limits, std::int32_t max_num_seqs)
    : limits_(std::move(limits)), max_num_seqs_(max_num_seqs) {
  std::sort(limits_.begin(), limits_.end(),
            [](const TierLimit& a, const TierLimit& b) { return a.tier < b.tier; });
  std::int64_t reserved = 0;
  for (std::size_t i = 0; i < limits_.size(); ++i) {
    const std::string name = "tier " + std::to_string(limits_[i].tier);
    if (i > 0 && limits_[i - 1].tier == limits_[i].tier) {
      throw ConfigError(name + " has two limits");
    }
    if (limits_[i].max_num_seqs < 0 || limits_[i].reserved_seqs < 0) {
      throw ConfigError(name + " has a negative limit");
    }
    reserved += limits_[i].reserved_seqs;
  }
  if (reserved > 0 && reserved >= max_num_seqs) {
    throw ConfigError("tiers reserve " + std::to_string(reserved) + " of max_num_seqs = " +
                      std::to_string(max_num_seqs) + ", which leaves nothing to other tiers");
  }
}

std::int32_t TierLimits::group_of(std::int32_t tier) const {
  const auto at =
      std::lower_bound(limits_.begin(), limits_.end(), tier,
                       [](const TierLimit& limit, std::int32_t t) { return limit.tier < t; });
  const auto before = 2 * static_cast<std::int32_t>(at - limits_.begin());
  return at != limits_.end() && at->tier == tier ? before + 1 : before;
}

std::int32_t TierLimits::room_for(std::int32_t group, std::span<const std::int32_t> running,
                                  std::int32_t room) const {
  for (std::size_t i = 0; i < limits_.size(); ++i) {
    const std::size_t of_tier = 2 * i + 1;
    if (static_cast<std::size_t>(group) < of_tier) break;
    const std::int32_t now = running.empty() ? 0 : running[of_tier];
    if (static_cast<std::size_t>(group) > of_tier) {
      room -= std::max(limits_[i].reserved_seqs - now, 0);
    } else if (limits_[i].max_num_seqs > 0) {
      room = std::min(room, limits_[i].max_num_seqs - now);
    }
  }
  return room;
}

std::int32_t TierLimits::most_of(std::int32_t group) const {
  return room_for(group, {}, max_num_seqs_);
}

}  // namespace batchcore
