#include "engine/queue_load.h"

#include <algorithm>
#include <cstdio>
#include <limits>

namespace batchcore {
namespace {

constexpr double kUnknownRetryS = 1.0;
constexpr double kMinRetryS = 0.05;
constexpr double kMaxRetryS = 300.0;

std::int64_t num_tokens(const RequestSpec& spec) {
  return static_cast<std::int64_t>(spec.prompt.size());
}

double patience_s(const RequestSpec& spec) {
  constexpr double kForever = std::numeric_limits<double>::infinity();
  return std::min(spec.timeout_s.value_or(kForever), spec.queue_timeout_s.value_or(kForever));
}

std::string in_seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", value);
  return text;
}

}  // namespace

void QueueLoad::add(const RequestSpec& spec) {
  const std::int64_t tokens = num_tokens(spec);
  total_.requests += 1;
  total_.tokens += tokens;
  Amount& of_user = by_user_[spec.user];
  of_user.requests += 1;
  of_user.tokens += tokens;
  TierTokens& tier = tiers_[spec.priority];
  tier.all += tokens;
  UserTokens& in_tier = tier.by_user[spec.user];
  in_tier.all += tokens;
  in_tier.requests += 1;
  if (spec.timeout_s || spec.queue_timeout_s) in_tier.urgent += tokens;
}

void QueueLoad::remove(const RequestSpec& spec) {
  const std::int64_t tokens = num_tokens(spec);
  total_.requests -= 1;
  total_.tokens -= tokens;
  const auto of_user = by_user_.find(spec.user);
  of_user->second.tokens -= tokens;
  if (--of_user->second.requests == 0) by_user_.erase(of_user);
  const auto tier = tiers_.find(spec.priority);
  tier->second.all -= tokens;
  const auto in_tier = tier->second.by_user.find(spec.user);
  in_tier->second.all -= tokens;
  if (spec.timeout_s || spec.queue_timeout_s) in_tier->second.urgent -= tokens;
  if (--in_tier->second.requests > 0) return;
  tier->second.by_user.erase(in_tier);
  if (tier->second.by_user.empty()) tiers_.erase(tier);
}

void QueueLoad::require_room(std::span<const RequestSpec* const> specs) {
  Amount more;
  std::unordered_map<std::string, Amount> more_of;
  for (const RequestSpec* spec : specs) {
    more.requests += 1;
    more.tokens += num_tokens(*spec);
    Amount& of_user = more_of[spec->user];
    of_user.requests += 1;
    of_user.tokens += num_tokens(*spec);
  }
  refuse(check_totals(more));
  for (const auto& [user, amount] : more_of) refuse(check_user(user, amount));
  if (!bounds_.sheds) return;
  const Refusal shed = check_deadlines(specs);
  num_shed_ += shed ? 1 : 0;
  refuse(shed);
}

bool QueueLoad::has_room(const QueueDemand& demand) const {
  const Amount more{demand.num_requests, demand.num_tokens};
  return !check_totals(more) && !check_user(demand.user, more);
}

QueueLoad::Refusal QueueLoad::check_totals(const Amount& more) const {
  const std::int64_t requests = total_.requests + more.requests - bounds_.max_requests;
  if (requests > 0) {
    return QueueFullError(
        "the queue is full: " + std::to_string(total_.requests) + " requests are waiting",
        bounds_.max_requests, seconds_for(static_cast<double>(requests), 0.0));
  }
  // One request is always taken, however long, so that the bound can't make a valid one impossible.
  const bool is_first = total_.requests == 0 && more.requests == 1;
  const std::int64_t tokens = total_.tokens + more.tokens - bounds_.max_tokens;
  if (!is_first && tokens > 0) {
    return QueueFullError(
        "the queue is full: " + std::to_string(total_.tokens) + " prompt tokens are waiting",
        bounds_.max_tokens, seconds_for(0.0, static_cast<double>(tokens)));
  }
  return std::nullopt;
}

QueueLoad::Refusal QueueLoad::check_user(const std::string& user, const Amount& more) const {
  if (bounds_.max_requests_per_user <= 0 && bounds_.max_tokens_per_user <= 0) return std::nullopt;
  const auto found = by_user_.find(user);
  const Amount now = found == by_user_.end() ? Amount{} : found->second;
  // Places become free for this user as often as for every other who waits.
  const auto num_users = static_cast<double>(std::max<std::size_t>(by_user_.size(), 1));
  const std::int64_t requests = now.requests + more.requests - bounds_.max_requests_per_user;
  if (bounds_.max_requests_per_user > 0 && requests > 0) {
    return QueueFullError("the queue is full for this user: " + std::to_string(now.requests) +
                              " of its requests are waiting",
                          bounds_.max_requests_per_user,
                          seconds_for(static_cast<double>(requests) * num_users, 0.0));
  }
  const bool is_first = now.requests == 0 && more.requests == 1;
  const std::int64_t tokens = now.tokens + more.tokens - bounds_.max_tokens_per_user;
  if (bounds_.max_tokens_per_user > 0 && !is_first && tokens > 0) {
    return QueueFullError("the queue is full for this user: " + std::to_string(now.tokens) +
                              " of its prompt tokens are waiting",
                          bounds_.max_tokens_per_user,
                          seconds_for(0.0, static_cast<double>(tokens) * num_users));
  }
  return std::nullopt;
}

std::int64_t QueueLoad::tokens_ahead(const RequestSpec& spec) const {
  std::int64_t ahead = 0;
  for (const auto& [tier, tokens] : tiers_) {
    if (tier >= spec.priority) break;
    ahead += tokens.all;
  }
  const auto tier = tiers_.find(spec.priority);
  if (tier == tiers_.end()) return ahead;
  const auto& by_user = tier->second.by_user;
  const auto own = by_user.find(spec.user);
  if (own == by_user.end()) return ahead;
  const std::int64_t others = tier->second.all - own->second.all;
  const auto num_others = static_cast<std::int64_t>(by_user.size() - 1);
  return ahead + own->second.urgent + std::min(others, own->second.urgent * num_others);
}

QueueLoad::Refusal QueueLoad::check_deadlines(std::span<const RequestSpec* const> specs) const {
  if (!rate_.is_known()) return std::nullopt;
  std::int64_t before = 0;  // of this very call
  for (const RequestSpec* spec : specs) {
    const double patience = patience_s(*spec);
    const auto ahead = static_cast<double>(tokens_ahead(*spec) + before);
    const double wait = ahead / rate_.tokens_per_s();
    before += num_tokens(*spec);
    if (wait <= patience) continue;
    return QueueFullError("the request would wait for about " + in_seconds(wait) +
                              ", longer than its timeout of " + in_seconds(patience),
                          static_cast<std::int64_t>(rate_.tokens_per_s() * std::max(patience, 0.0)),
                          std::clamp(wait - patience, kMinRetryS, kMaxRetryS));
  }
  return std::nullopt;
}

void QueueLoad::refuse(const Refusal& refusal) {
  if (!refusal) return;
  num_refused_ += 1;
  throw QueueFullError(*refusal);
}

// Until as many requests or prompt tokens have left the queue.
double QueueLoad::seconds_for(double requests, double tokens) const {
  if (!rate_.is_known()) return kUnknownRetryS;
  const double seconds = std::max(requests / rate_.requests_per_s(), tokens / rate_.tokens_per_s());
  return std::clamp(seconds, kMinRetryS, kMaxRetryS);
}

}  // namespace batchcore
