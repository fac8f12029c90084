// A sampler that copies, sorts and sums everything in double: slow, short, and what the real one is
// tested against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/sampling_params.h"
#include "core/types.h"
#include "core/vocab.h"

namespace batchcore::testing {

inline Vocab make_vocab(std::int32_t size, const std::vector<Token>& ends = {}) {
  Vocab vocab;
  for (std::int32_t i = 0; i < size; ++i) vocab.add_piece("x");
  for (const Token end : ends) vocab.add_end_of_generation(end);
  return vocab;
}

struct Choice {
  Token token = -1;
  double probability = 0.0;
};

/// NaN is minus infinity, plus infinity the largest float.
inline float plain_logit(float logit) {
  if (std::isnan(logit)) return -std::numeric_limits<float>::infinity();
  return std::min(logit, std::numeric_limits<float>::max());
}

/// The logits after bias, min_tokens and penalties.
inline std::vector<float> adjusted_logits(const SamplingParams& params, const Vocab& vocab,
                                          std::span<const Token> prompt,
                                          std::span<const Token> output,
                                          std::span<const float> logits) {
  std::vector<float> result(logits.begin(), logits.end());
  for (const auto& [token, bias] : params.logit_bias) result[token] += bias;
  if (static_cast<std::int32_t>(output.size()) < params.min_tokens) {
    const float never = -std::numeric_limits<float>::infinity();
    for (const Token token : params.stop_token_ids) result[token] = never;
    if (!params.ignore_eos) {
      for (const Token token : vocab.end_of_generation()) result[token] = never;
    }
  }
  for (std::size_t i = 0; i < result.size(); ++i) {
    const auto token = static_cast<Token>(i);
    const auto count = std::count(output.begin(), output.end(), token);
    if (count > 0 || std::find(prompt.begin(), prompt.end(), token) != prompt.end()) {
      result[i] = result[i] > 0 ? result[i] / params.repetition_penalty
                                : result[i] * params.repetition_penalty;
    }
    if (count > 0) {
      result[i] -= params.frequency_penalty * static_cast<float>(count);
      result[i] -= params.presence_penalty;
    }
  }
  for (float& logit : result) logit = plain_logit(logit);
  return result;
}

/// Tokens in order (largest logit first, lowest id at a tie), those without a chance left out.
inline std::vector<Choice> ordered(std::span<const float> logits, double temperature) {
  std::vector<Choice> choices;
  const float best = *std::max_element(logits.begin(), logits.end());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isinf(logits[i])) continue;
    const double z = (static_cast<double>(logits[i]) - best) / temperature;
    choices.push_back({static_cast<Token>(i), std::exp(z)});
  }
  std::stable_sort(choices.begin(), choices.end(), [&](const Choice& a, const Choice& b) {
    return logits[a.token] > logits[b.token];
  });
  return choices;
}

inline void normalise(std::vector<Choice>& choices) {
  double total = 0.0;
  for (const Choice& choice : choices) total += choice.probability;
  for (Choice& choice : choices) choice.probability /= total;
}

/// What can be drawn, with probabilities. `slack` loosens (> 0) or tightens (< 0) min_p and top_p,
/// as tokens at their very edge depend on rounding.
inline std::vector<Choice> distribution(const SamplingParams& params,
                                        std::span<const float> adjusted, double slack = 0.0) {
  std::vector<Choice> choices = ordered(adjusted, params.temperature);
  std::erase_if(choices,
                [&](const Choice& c) { return c.probability < params.min_p * (1 - slack); });
  if (params.top_k > 0 && choices.size() > static_cast<std::size_t>(params.top_k)) {
    choices.resize(static_cast<std::size_t>(params.top_k));
  }
  normalise(choices);
  if (params.top_p < 1.0F) {
    double sum = 0.0;
    std::size_t kept = 0;
    while (kept < choices.size() && (kept == 0 || sum < params.top_p + slack)) {
      sum += choices[kept++].probability;
    }
    choices.resize(kept);
    normalise(choices);
  }
  return choices;
}

}  // namespace batchcore::testing
