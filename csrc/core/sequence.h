// One completion of a request as the scheduler sees it. Owned by the engine (which derives from
// it), touched by the engine thread only.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/ngram_draft.h"
#include "core/speculation.h"
#include "core/static_batch.h"
#include "core/types.h"

namespace batchcore {

/// Who keeps what it holds: lower priority number, then earlier arrival, then lower completion
/// index. Never changes. In which order those that wait get a slot is WaitingQueue's matter.
struct Rank {
  std::int32_t priority = 0;
  std::uint64_t arrival = 0;
  std::int32_t index = 0;
  auto operator<=>(const Rank&) const = default;
};

/// A sequence is its tokens and how many of them the KV memory holds. One rule covers prefill,
/// decode and recomputing after a preemption: a step computes the next pending tokens, and a step
/// that reaches the last token samples the next one.
struct Sequence {
  static constexpr double kDraftMemory = 16.0;  ///< drafted tokens

  RequestId request_id = 0;
  Rank rank;
  UserId user = 0;
  double arrived_at = 0.0;  ///< on the engine's clock, as are all times here
  double deadline = std::numeric_limits<double>::infinity();
  std::int32_t tier_group = 0;  ///< TierLimits::group_of() its priority

  std::vector<Token> tokens;           ///< prompt, then what was generated
  std::int32_t num_prompt_tokens = 0;  ///< > 0
  std::int32_t max_tokens_total = 0;   ///< prompt and output together, at most

  SeqId slot = -1;                ///< -1 while it waits
  std::int32_t num_computed = 0;  ///< tokens whose KV cells exist in `slot`
  std::int32_t num_shared = 0;    ///< leading cells that it shares with other sequences
  std::int32_t num_forks = 0;     ///< sibling completions that start when this prefill is done
  std::int32_t num_preemptions = 0;
  StaticBatch* batch = nullptr;  ///< the static batch that it belongs to, if any
  bool has_started = false;      ///< it is in that batch's num_started
  std::int32_t num_saved = 0;    ///< tokens whose cells lie in host memory since a preemption

  Draft draft;  ///< what may follow the tokens, in the step that is being made
  DraftRates draft_rates{kDraftMemory};

  // WaitingQueue's; a running sequence keeps what it had when it was admitted.
  std::int32_t lift = 0;  ///< tiers that it has gained by waiting
  bool has_aged = false;  ///< has waited long enough to gain one, were there a better tier
  double lifts_at = 0.0;  ///< when it gains the next one

  [[nodiscard]] std::int32_t num_tokens() const { return static_cast<std::int32_t>(tokens.size()); }
  [[nodiscard]] std::int32_t num_pending() const { return num_tokens() - num_computed; }
  [[nodiscard]] std::int32_t num_generated() const { return num_tokens() - num_prompt_tokens; }
  /// Its priority, or better where it has waited long.
  [[nodiscard]] std::int32_t effective_tier() const { return rank.priority - lift; }
  /// One token behind its last: the next step yields a token for the price of a single row.
  [[nodiscard]] bool is_decoding() const { return num_computed > 0 && num_pending() == 1; }
};

}  // namespace batchcore
