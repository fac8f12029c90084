// Requests of a simulation and what became of them: plain numbers, so that millions of them are an
// array that Python shares.
#pragma once

#include <cstdint>
#include <limits>

namespace batchcore {

struct SimRequest {
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  double arrival_s = 0.0;           ///< on the simulation's clock, which starts at 0
  double timeout_s = kNever;        ///< from its arrival
  double queue_timeout_s = kNever;  ///< from its arrival until it has a slot
  std::int32_t num_prompt_tokens = 1;
  std::int32_t num_output_tokens = 1;  ///< exactly as many, which the scheduler knows as a bound
  std::int32_t user = 0;               ///< index into SimOptions::users
  std::int32_t priority = 0;
  std::int32_t prefix_group = -1;  ///< requests of one group start alike; < 0: like nobody
  std::int32_t num_shared_tokens = 0;
  std::int32_t key = 0;  ///< what its own tokens are made from: equal keys, equal prompts
};

/// How a request ended: a FinishReason's number, or one of these.
enum class SimEnd : std::int32_t {
  kRefused = 5,  ///< at its arrival, by a bound of the queue
  kOpen = 6,     ///< not yet
};

/// Times are on the simulation's clock, NaN where not reached.
struct SimOutcome {
  static constexpr double kNotReached = std::numeric_limits<double>::quiet_NaN();

  double arrival_s = 0.0;
  double admitted_s = kNotReached;
  double first_token_s = kNotReached;
  double finished_s = kNotReached;  ///< of a refused one its arrival
  std::int32_t num_output_tokens = 0;
  std::int32_t num_cached_tokens = 0;
  std::int32_t num_preemptions = 0;
  std::int32_t end = static_cast<std::int32_t>(SimEnd::kOpen);
};

}  // namespace batchcore
