#include "engine/token_adjustments.h"

#include <algorithm>

namespace batchcore {

TokenAdjustments::TokenAdjustments(const SamplingParams& params, std::int32_t num_tokens,
                                   std::span<const Token> stop_tokens,
                                   std::span<const Token> prompt)
    : num_tokens_(num_tokens),
      min_tokens_(params.min_tokens),
      repetition_penalty_(params.repetition_penalty),
      presence_penalty_(params.presence_penalty),
      frequency_penalty_(params.frequency_penalty) {
  if (repetition_penalty_ != 1.0F) {
    // Sorted at once: inserting a long prompt token by token would be quadratic.
    std::vector<Token> distinct(prompt.begin(), prompt.end());
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    adjustments_.reserve(distinct.size() + stop_tokens.size() + params.logit_bias.size());
    for (const Token token : distinct) {
      if (token < 0 || token >= num_tokens_) continue;
      adjustments_.push_back({.token = token, .in_prompt = true});
    }
  }
  if (min_tokens_ > 0) {
    for (const Token token : stop_tokens) {
      if (token >= 0 && token < num_tokens_) at(token).is_stop = true;
    }
  }
  for (const auto& [token, bias] : params.logit_bias) {
    if (token >= 0 && token < num_tokens_) at(token).bias += bias;
  }
}

void TokenAdjustments::add_output(Token token) {
  const bool penalise =
      repetition_penalty_ != 1.0F || presence_penalty_ != 0.0F || frequency_penalty_ != 0.0F;
  if (penalise && token >= 0 && token < num_tokens_) ++at(token).output_count;
}

void TokenAdjustments::collect(const float* logits, std::int32_t num_generated,
                               std::vector<TokenLogit>& into) const {
  into.clear();
  const bool ban_stops = num_generated < min_tokens_;
  for (const Adjustment& adjustment : adjustments_) {
    const float raw = logits[adjustment.token];
    const bool banned = ban_stops && adjustment.is_stop;
    const float logit = banned ? kNoLogit : penalised(raw + adjustment.bias, adjustment);
    if (logit != raw) into.push_back({adjustment.token, logit});
  }
}

TokenAdjustments::Adjustment& TokenAdjustments::at(Token token) {
  const auto found =
      std::lower_bound(adjustments_.begin(), adjustments_.end(), token,
                       [](const Adjustment& a, Token wanted) { return a.token < wanted; });
  if (found != adjustments_.end() && found->token == token) return *found;
  return *adjustments_.insert(found, {.token = token});
}

float TokenAdjustments::penalised(float logit, const Adjustment& adjustment) const {
  if (adjustment.in_prompt || adjustment.output_count > 0) {
    logit = logit > 0.0F ? logit / repetition_penalty_ : logit * repetition_penalty_;
  }
  if (adjustment.output_count > 0) {
    logit -= frequency_penalty_ * static_cast<float>(adjustment.output_count);
    logit -= presence_penalty_;
  }
  return logit;
}

}  // namespace batchcore
