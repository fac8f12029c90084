#include "sim/sim_prompt.h"

#include <cmath>
#include <string>

#include "core/errors.h"

namespace batchcore {
namespace {

// Knuth's multiplicative hashing (TAOCP vol. 3, 6.4), to spread small numbers; kept below
// kSimVocabSize / 2.
std::int32_t spread(std::uint32_t seed, std::uint32_t position) {
  return static_cast<std::int32_t>(((seed + position) * 2654435761U) >> 2U);
}

}  // namespace

void check(const SimRequest& request) {
  const auto demand = [](bool holds, const std::string& what) {
    if (!holds) throw InvalidRequestError("a simulated request " + what);
  };
  demand(request.arrival_s >= 0.0 && std::isfinite(request.arrival_s),
         "arrives at a time of at least 0 s");
  demand(request.num_prompt_tokens > 0, "has at least one prompt token");
  demand(request.num_output_tokens > 0, "has at least one output token");
  demand(request.timeout_s > 0.0 && request.queue_timeout_s > 0.0, "has timeouts above 0 s");
  demand(request.num_shared_tokens >= 0 && request.num_shared_tokens <= request.num_prompt_tokens,
         "shares at most its prompt");
  demand(request.key >= 0 && request.key < kMaxSimKeys && request.prefix_group < kMaxSimKeys,
         "has a key and a group below " + std::to_string(kMaxSimKeys));
}

// Where two prompts part, one of them has the first token of its own, which is odd, above all that
// spread() gives, and nobody else's. Tokens of a group are even; its first one names it.
std::vector<Token> sim_prompt(const SimRequest& request) {
  std::vector<Token> tokens(static_cast<std::size_t>(request.num_prompt_tokens));
  const std::int32_t num_shared = request.prefix_group < 0 ? 0 : request.num_shared_tokens;
  const auto group = static_cast<std::uint32_t>(request.prefix_group);
  const auto key = static_cast<std::uint32_t>(request.key);
  Token* out = tokens.data();
  std::int32_t at = 0;
  for (; at < num_shared; ++at) {
    out[at] =
        at == 0 ? 2 * request.prefix_group : spread(group, static_cast<std::uint32_t>(at)) & ~1;
  }
  if (at < request.num_prompt_tokens) out[at++] = kSimVocabSize / 2 + 2 + 2 * request.key;
  for (; at < request.num_prompt_tokens; ++at) {
    out[at] = spread(key, static_cast<std::uint32_t>(at));
  }
  return tokens;
}

}  // namespace batchcore
