// What callers hand to an engine and get back. Plain data; the channel that carries it between
// threads is in request_channel.h.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/sampling_params.h"
#include "core/types.h"

namespace batchcore {

class Notifier;

/// The terminal states. Every request reaches exactly one, and so does each of its completions.
enum class FinishReason { kStop, kLength, kCancelled, kTimeout, kError };

inline constexpr std::array<std::string_view, 5> kFinishReasonNames{"stop", "length", "cancelled",
                                                                    "timeout", "error"};

inline std::string_view to_string(FinishReason reason) {
  return kFinishReasonNames[static_cast<std::size_t>(reason)];
}

/// What made a completion end with kStop: nothing special (end of generation), a stop token or a
/// stop string.
using StopReason = std::variant<std::monostate, Token, std::string>;

struct RequestSpec {
  std::vector<Token> prompt;
  SamplingParams sampling;
  std::int32_t priority = 0;              ///< the tier, lower first
  std::string user;                       ///< whose share of the engine it counts against
  std::optional<double> timeout_s;        ///< from submit, in the queue and while running
  std::optional<double> queue_timeout_s;  ///< from submit, while it was never admitted
  bool streams = false;                   ///< publish after every call, not just at the end
  bool pins = false;                      ///< its prompt stays in the KV memory until unpin()
  std::shared_ptr<Notifier> notifier;     ///< told when there is something to take; may be null
};

/// What one completion gained since it was last taken.
struct CompletionDelta {
  std::int32_t index = 0;
  std::string text;  ///< whole UTF-8 characters
  std::vector<Token> token_ids;
  std::vector<PositionLogprobs> logprobs;  ///< one per token where asked for
  std::optional<FinishReason> finish_reason;
  StopReason stop_reason;
};

/// Times are in seconds on the engine's clock, 0 where not reached.
struct RequestMetrics {
  double arrival_s = 0.0;
  double admitted_s = 0.0;
  double first_token_s = 0.0;
  double finished_s = 0.0;
  std::int32_t num_cached_tokens = 0;
  std::int32_t num_preemptions = 0;
  std::int64_t attention_needed = 0;    ///< key positions that its rows attend to, over all layers
  std::int64_t attention_computed = 0;  ///< those that attention went over for them
};

struct RequestUpdate {
  std::vector<CompletionDelta> deltas;  ///< at most one per completion
  bool finished = false;
  std::exception_ptr error;  ///< set where the request failed as a whole
  RequestMetrics metrics;
};

}  // namespace batchcore
