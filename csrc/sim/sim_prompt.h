// Tokens for requests that are only numbers. The same request always gets the same ones; two share
// a prefix exactly where they are of one group, or have the same key.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "core/types.h"
#include "sim/sim_request.h"

namespace batchcore {

/// Large enough that tokens say by themselves whose they are.
inline constexpr std::int32_t kSimVocabSize = std::numeric_limits<std::int32_t>::max();
/// Keys and groups that are told apart.
inline constexpr std::int32_t kMaxSimKeys = kSimVocabSize / 4;

/// Throws InvalidRequestError where the numbers make no request.
void check(const SimRequest& request);

/// The prompt of a request that passed check().
[[nodiscard]] std::vector<Token> sim_prompt(const SimRequest& request);

}  // namespace batchcore
