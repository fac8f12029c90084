// The few tokens of a sequence whose logits a request changes: bias, the ban on stopping early, and
// penalties. One per sequence; owned by its Sampler.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/sampling_params.h"
#include "core/types.h"
#include "engine/logit_view.h"

namespace batchcore {

class TokenAdjustments {
 public:
  /// `stop_tokens`, ascending, are banned while fewer than params.min_tokens tokens exist. Tokens
  /// outside [0, num_tokens) are ignored.
  TokenAdjustments(const SamplingParams& params, std::int32_t num_tokens,
                   std::span<const Token> stop_tokens, std::span<const Token> prompt);

  /// `token` was added to the output.
  void add_output(Token token);

  /// Writes the logits that differ from `logits`, ascending by token. `num_generated` counts
  /// outputs.
  void collect(const float* logits, std::int32_t num_generated,
               std::vector<TokenLogit>& into) const;

 private:
  struct Adjustment {
    Token token = -1;
    float bias = 0.0F;
    std::int32_t output_count = 0;
    bool in_prompt = false;
    bool is_stop = false;
  };

  Adjustment& at(Token token);
  [[nodiscard]] float penalised(float logit, const Adjustment& adjustment) const;

  std::int32_t num_tokens_;
  std::int32_t min_tokens_;
  float repetition_penalty_;
  float presence_penalty_;
  float frequency_penalty_;
  std::vector<Adjustment> adjustments_;  // ascending by token
};

}  // namespace batchcore
