#include "core/fair_share.h"

#include <algorithm>
#include <utility>

namespace batchcore {
namespace {

// FNV-1a: the same on every machine and in every run, unlike std::hash.
std::size_t hash_of(const std::string& name) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const char byte : name) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211ULL;
  }
  return static_cast<std::size_t>(hash % FairShare::kNumServiceBuckets);
}

}  // namespace

FairShare::FairShare(FairShareConfig config) : config_(std::move(config)) { find_or_add(""); }

UserId FairShare::find_or_add(const std::string& name) {
  if (const auto found = ids_.find(name); found != ids_.end()) return found->second;
  auto user = static_cast<UserId>(users_.size());
  if (free_ids_.empty()) {
    users_.emplace_back();
  } else {
    user = free_ids_.back();
    free_ids_.pop_back();
  }
  const auto weight = config_.user_weights.find(name);
  users_[index(user)] = {
      name, weight == config_.user_weights.end() ? 1.0 : weight->second, 0.0, 0, 0, hash_of(name)};
  ids_.emplace(name, user);
  return user;
}

UserId FairShare::enter(const std::string& name) {
  const UserId user = find_or_add(name);
  User& entry = users_[index(user)];
  if (entry.num_open++ > 0) return user;
  leave_idle(user);
  entry.counter = std::max(entry.counter, virtual_time());
  active_.emplace(entry.counter, user);
  return user;
}

void FairShare::leave(UserId user) {
  User& entry = users_[index(user)];
  if (--entry.num_open > 0) return;
  active_.erase({entry.counter, user});
  // Otherwise whoever used an idle engine would stand behind all who come later.
  if (active_.empty()) floor_ = std::max(floor_, entry.counter);
  if (user != 0) {
    entry.left_at = num_left_++;
    idle_.emplace(entry.counter, user);
    idle_by_age_.emplace(entry.left_at, user);
  }
  forget_some();
}

void FairShare::charge(UserId user, double cost) {
  User& entry = users_[index(user)];
  service_[entry.bucket] += cost;
  const double counter = entry.counter + share_of(user, cost);
  if (entry.num_open > 0) {
    auto node = active_.extract({entry.counter, user});
    node.value().first = counter;
    active_.insert(std::move(node));
  }
  entry.counter = counter;
}

double FairShare::virtual_time() const {
  return active_.empty() ? floor_ : std::max(floor_, active_.begin()->first);
}

void FairShare::leave_idle(UserId user) {
  const User& entry = users_[index(user)];
  if (idle_.erase({entry.counter, user}) > 0) idle_by_age_.erase(entry.left_at);
}

void FairShare::forget(UserId user) {
  leave_idle(user);
  ids_.erase(users_[index(user)].name);
  users_[index(user)] = {};
  free_ids_.push_back(user);
}

// Those whose counter would be lifted anyway lose nothing by it.
void FairShare::forget_some() {
  const double now = virtual_time();
  while (!idle_.empty() && idle_.begin()->first <= now) forget(idle_.begin()->second);
  while (idle_.size() > config_.max_idle_users) forget(idle_by_age_.begin()->second);
}

std::optional<std::string> FairShare::check_integrity() const {
  std::size_t num_active = 0;
  for (const auto& [name, user] : ids_) {
    const User& entry = users_[index(user)];
    if (entry.name != name) return "two users have one number";
    const bool is_active = entry.num_open > 0;
    num_active += is_active ? 1 : 0;
    if (active_.count({entry.counter, user}) != (is_active ? 1U : 0U)) {
      return "an active user is not in the order of counters";
    }
    if (idle_.count({entry.counter, user}) != (!is_active && user != 0 ? 1U : 0U)) {
      return "an idle user is not in the order of counters";
    }
  }
  if (num_active != active_.size() || idle_.size() != idle_by_age_.size() ||
      idle_.size() > config_.max_idle_users || users_.size() != ids_.size() + free_ids_.size()) {
    return "users are counted wrongly";
  }
  return std::nullopt;
}

}  // namespace batchcore
