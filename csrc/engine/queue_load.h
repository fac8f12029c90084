// What waits for its first slot, as far as callers' threads have to know it to refuse more. Guarded
// by the engine's inbox mutex.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <unordered_map>

#include "core/queue_rate.h"
#include "engine/request.h"

namespace batchcore {

/// 0 is no bound for those per user.
struct QueueBounds {
  std::int64_t max_requests = 0;
  std::int64_t max_tokens = 0;
  std::int64_t max_requests_per_user = 0;
  std::int64_t max_tokens_per_user = 0;
  bool sheds = false;  ///< refuses at once who would wait longer than its timeout
};

class QueueLoad {
 public:
  explicit QueueLoad(const QueueBounds& bounds) : bounds_(bounds) {}

  /// Throws QueueFullError where not all of them can be taken.
  void require_room(std::span<const RequestSpec* const> specs);
  void add(const RequestSpec& spec);
  void remove(const RequestSpec& spec);
  void set_rate(const QueueRate& rate) { rate_ = rate; }

  /// Prompt tokens that are likely to be admitted before a request that comes now: all of better
  /// tiers; in its own those of its user that have a deadline too, and as much of every other user.
  [[nodiscard]] std::int64_t tokens_ahead(const RequestSpec& spec) const;

  [[nodiscard]] std::int64_t num_requests() const { return total_.requests; }
  [[nodiscard]] std::int64_t num_refused() const { return num_refused_; }
  [[nodiscard]] std::int64_t num_shed() const { return num_shed_; }

 private:
  struct Amount {
    std::int64_t requests = 0;
    std::int64_t tokens = 0;
  };
  struct UserTokens {
    std::int64_t all = 0;
    std::int64_t urgent = 0;  // of requests with a deadline
    std::int64_t requests = 0;
  };
  struct TierTokens {
    std::int64_t all = 0;
    std::unordered_map<std::string, UserTokens> by_user;
  };

  void check_totals(const Amount& more);
  void check_user(const std::string& user, const Amount& more);
  void check_deadlines(std::span<const RequestSpec* const> specs);
  [[noreturn]] void refuse(const std::string& message, std::int64_t bound, double retry_after_s);
  [[nodiscard]] double seconds_for(double requests, double tokens) const;

  QueueBounds bounds_;
  QueueRate rate_;
  Amount total_;
  std::unordered_map<std::string, Amount> by_user_;
  std::map<std::int32_t, TierTokens> tiers_;
  std::int64_t num_refused_ = 0;
  std::int64_t num_shed_ = 0;
};

}  // namespace batchcore
