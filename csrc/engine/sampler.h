// Chooses the next token of one sequence. A Sampler belongs to its sequence's engine thread, which
// calls accept(); sample() is const and may run on any thread while nobody calls accept().
//
// The stages, in this order (as vLLM documents them):
//   1. logit_bias is added.
//   2. While fewer than min_tokens tokens exist, tokens that would stop are forbidden.
//   3. repetition_penalty, over prompt and output: positive logits are divided, others multiplied.
//   4. frequency_penalty (times the count) and presence_penalty, over output only, are subtracted.
//   5. temperature divides. Below kGreedyTemperature the largest logit wins, the lowest id at a
//   tie,
//      and nothing that follows matters.
//   6. min_p keeps tokens at least min_p times as likely as the likeliest one.
//   7. top_k keeps the k largest, the lower ids at a tie.
//   8. top_p keeps the fewest that hold top_p of what is left, renormalised.
//   9. One of them is drawn.
// Log-probabilities are the log-softmax of the model's own logits, before all of this.
//
// NaN counts as minus infinity, plus infinity as the largest float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/sampling_params.h"
#include "core/types.h"
#include "core/vocab.h"
#include "engine/random_stream.h"
#include "engine/sampler_scratch.h"
#include "engine/token_adjustments.h"

namespace batchcore {

struct SampledToken {
  Token token = -1;
  std::optional<PositionLogprobs> logprobs;  ///< where the request asked for them

  /// False where no token has a logit above minus infinity: the model's output is broken, or every
  /// token is forbidden. The request has to end with an error.
  [[nodiscard]] bool valid() const { return token >= 0; }
};

/// Why a token ends a sequence.
enum class StopCause {
  kNone,             ///< it doesn't
  kEndOfGeneration,  ///< the model's own end
  kStopToken,        ///< one of the request's stop_token_ids
};

class Sampler {
 public:
  /// Temperatures below are greedy: at float precision only the largest logit would be left.
  static constexpr float kGreedyTemperature = 1e-5F;

  /// `index` is the completion's index within its request (n > 1); each has its own random stream,
  /// derived from (params.seed, index). `vocab` must outlive the sampler.
  Sampler(const SamplingParams& params, std::int32_t index, const Vocab& vocab,
          std::span<const Token> prompt);

  /// Chooses the next token from vocab.size() logits, which are only read. Changes no state: the
  /// same sampler and logits give the same result, bit for bit, on any thread.
  [[nodiscard]] SampledToken sample(const float* logits, SamplerScratch& scratch) const;

  /// The token was added to the sequence (also one that sample() didn't choose).
  void accept(Token token);

  /// Whether `token`, not yet accepted, ends the sequence.
  [[nodiscard]] StopCause stop_cause(Token token) const;
  [[nodiscard]] bool is_stop(Token token) const { return stop_cause(token) != StopCause::kNone; }

  [[nodiscard]] std::int32_t num_generated() const { return num_generated_; }

  /// Rough cost of sample(), in units of looking at one logit; tells short work from long.
  [[nodiscard]] std::size_t work() const;

 private:
  [[nodiscard]] Token choose(const LogitView& view, SamplerScratch& scratch) const;
  [[nodiscard]] Token draw_from_top_k(const LogitView& view, SoftmaxScale scale,
                                      SamplerScratch& scratch) const;
  [[nodiscard]] Token draw_from_min_p(const LogitView& view, SoftmaxScale scale,
                                      SamplerScratch& scratch) const;
  [[nodiscard]] Token draw_from_top_p(const LogitView& view, SoftmaxScale scale,
                                      SamplerScratch& scratch) const;
  [[nodiscard]] Token draw_from_all(const LogitView& view, SoftmaxScale scale,
                                    SamplerScratch& scratch) const;
  [[nodiscard]] Token draw(std::span<const Candidate> candidates) const;
  [[nodiscard]] PositionLogprobs logprobs(const LogitView& raw, TokenLogit sampled,
                                          SamplerScratch& scratch) const;

  const Vocab* vocab_;
  RandomStream random_;
  float temperature_;
  float top_p_;
  float min_p_;
  std::int32_t top_k_;
  std::int32_t min_tokens_;
  std::int32_t num_logprobs_;
  std::int32_t num_generated_ = 0;
  bool ignore_eos_;
  std::vector<Token> stop_tokens_;  // the request's, ascending
  TokenAdjustments adjustments_;
};

}  // namespace batchcore
