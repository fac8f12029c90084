// What a caller asks of the sampler, already validated. Python's SamplingParams is the only place
// with user-facing defaults; the values here mean "this stage does nothing".
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/types.h"

namespace batchcore {

struct SamplingParams {
  std::int32_t max_tokens = 1;      ///< tokens to generate at most, > 0
  std::int32_t min_tokens = 0;      ///< no stop token before this many tokens
  float temperature = 0.0F;         ///< 0 = greedy
  std::int32_t top_k = 0;           ///< 0 = off
  float top_p = 1.0F;               ///< (0, 1], 1 = off
  float min_p = 0.0F;               ///< [0, 1], 0 = off
  float repetition_penalty = 1.0F;  ///< > 0, over prompt and output, 1 = off
  float presence_penalty = 0.0F;    ///< over output
  float frequency_penalty = 0.0F;   ///< over output
  std::uint64_t seed = 0;           ///< always set: the engine draws one where the caller gave none
  std::int32_t logprobs = -1;       ///< -1 = none, 0 = the sampled token only, k = and the top k
  std::int32_t n = 1;               ///< completions that share one prefill
  bool ignore_eos = false;          ///< end-of-generation tokens neither stop nor are forbidden
  std::vector<Token> stop_token_ids;  ///< end with reason "stop", the token itself is not text
  std::vector<std::string> stop;      ///< stop strings (UTF-8), never part of the text
  std::vector<std::pair<Token, float>> logit_bias;  ///< added to the raw logit
};

}  // namespace batchcore
