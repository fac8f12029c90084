// What waits for its first slot, as far as callers' threads have to know it to refuse more. Guarded
// by the engine's inbox mutex.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>

#include "core/errors.h"
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

/// What somebody would like to submit.
struct QueueDemand {
  std::string user;
  std::int64_t num_requests = 1;
  std::int64_t num_tokens = 0;  ///< of their prompts
};

class QueueLoad {
 public:
  explicit QueueLoad(const QueueBounds& bounds) : bounds_(bounds) {}

  /// Throws QueueFullError where not all of them can be taken.
  void require_room(std::span<const RequestSpec* const> specs);
  /// Whether the bounds allow `demand`; whether it would be shed is another question.
  [[nodiscard]] bool has_room(const QueueDemand& demand) const;
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

  using Refusal = std::optional<QueueFullError>;

  [[nodiscard]] Refusal check_totals(const Amount& more) const;
  [[nodiscard]] Refusal check_user(const std::string& user, const Amount& more) const;
  [[nodiscard]] Refusal check_deadlines(std::span<const RequestSpec* const> specs) const;
  void refuse(const Refusal& refusal);
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
