// How much each user has been served, to serve next whoever got least: Virtual Token Counters
// (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24, arXiv 2401.00588), weighted.
// Owned by WaitingQueue, engine thread only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/types.h"

namespace batchcore {

struct FairShareConfig {
  double prompt_token_cost = 1.0;  ///< of a prompt token that no cached prefix saved
  double output_token_cost = 2.0;
  std::unordered_map<std::string, double> user_weights;  ///< share of a user, > 0; others have 1
  std::size_t max_idle_users = 4096;  ///< that are remembered; those who left first are forgotten
};

/// A user is active while it has requests that wait or run. Names are known by small numbers, which
/// may go to other users once a user is idle.
class FairShare {
 public:
  static constexpr std::size_t kNumServiceBuckets = 16;

  explicit FairShare(FairShareConfig config = {});

  /// One more request of this user, which becomes active with it. Having been idle earns nothing:
  /// its counter is lifted to the least of the active ones.
  UserId enter(const std::string& name);
  /// One request less.
  void leave(UserId user);

  /// Work for `user` that costs `cost`; its weight says how much that counts.
  void charge(UserId user, double cost);
  /// What charge() would add.
  [[nodiscard]] double share_of(UserId user, double cost) const {
    return cost / users_[index(user)].weight;
  }

  [[nodiscard]] double counter(UserId user) const { return users_[index(user)].counter; }
  /// Least counter of the active users; where there are none, that of the last one. Never falls.
  [[nodiscard]] double virtual_time() const;

  /// What was charged so far, unweighted, by a hash of the user's name: a view of how the service
  /// is spread that stays small with any number of users.
  [[nodiscard]] const std::array<double, kNumServiceBuckets>& service() const { return service_; }

  [[nodiscard]] std::size_t num_active() const { return active_.size(); }
  [[nodiscard]] std::size_t num_known() const { return ids_.size(); }
  [[nodiscard]] const FairShareConfig& config() const { return config_; }

  /// Recounts everything; a sentence that says what is wrong, or nothing.
  [[nodiscard]] std::optional<std::string> check_integrity() const;

 private:
  struct User {
    std::string name;
    double weight = 1.0;
    double counter = 0.0;
    std::int64_t num_open = 0;
    std::uint64_t left_at = 0;  // key in idle_by_age_
    std::size_t bucket = 0;
  };
  using ByCounter = std::set<std::pair<double, UserId>>;

  static std::size_t index(UserId user) { return static_cast<std::size_t>(user); }
  UserId find_or_add(const std::string& name);
  void leave_idle(UserId user);
  void forget(UserId user);
  void forget_some();

  FairShareConfig config_;
  std::vector<User> users_;
  std::vector<UserId> free_ids_;
  std::unordered_map<std::string, UserId> ids_;
  ByCounter active_;
  // The empty name is never forgotten, and so in neither of these.
  ByCounter idle_;
  std::map<std::uint64_t, UserId> idle_by_age_;
  std::uint64_t num_left_ = 0;
  std::array<double, kNumServiceBuckets> service_{};
  double floor_ = 0.0;  // virtual time when the last active user left
};

}  // namespace batchcore
