#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "engine/candidates.h"
#include "engine/logit_kernels.h"

namespace batchcore {
namespace {

// Keeps weights representable: the largest logits differ by 2 * kLargestLogit at most.
constexpr float kLargestTemperature = 1e30F;

std::vector<Token> sorted(std::vector<Token> tokens) {
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

// Tokens that min_tokens has to forbid, ascending.
std::vector<Token> tokens_that_stop(const SamplingParams& params, const Vocab& vocab) {
  std::vector<Token> tokens = params.stop_token_ids;
  if (!params.ignore_eos) {
    const auto ends = vocab.end_of_generation();
    tokens.insert(tokens.end(), ends.begin(), ends.end());
  }
  return sorted(std::move(tokens));
}

float finite_logit(float logit) {
  if (std::isnan(logit)) return kNoLogit;
  return std::min(logit, kLargestLogit);
}

float fill_maxima(const LogitView& view, std::vector<float>& maxima) {
  maxima.resize(view.num_blocks());
  view.for_each_run([&](const float* values, std::size_t first, std::size_t count) {
    block_maxima(values, count, maxima.data() + first);
  });
  float best = kNoLogit;
  for (const float value : maxima) best = value > best ? value : best;
  return best;
}

double fill_masses(const LogitView& view, SoftmaxScale scale, std::vector<float>& masses) {
  masses.resize(view.num_blocks());
  view.for_each_run([&](const float* values, std::size_t first, std::size_t count) {
    block_masses(values, count, scale, masses.data() + first);
  });
  double total = 0.0;
  for (const float mass : masses) total += mass;
  return total;
}

Token first_with(const LogitView& view, std::span<const float> maxima, float logit) {
  for (std::size_t b = 0; b < maxima.size(); ++b) {
    if (maxima[b] != logit) continue;
    const float* values = view.block(b);
    const std::size_t offset =
        static_cast<std::size_t>(std::find(values, values + kLogitBlock, logit) - values);
    return static_cast<Token>(b * kLogitBlock + offset);
  }
  return -1;
}

double total_weight(std::span<const Candidate> candidates) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

double weigh(std::span<Candidate> candidates, SoftmaxScale scale) {
  constexpr std::size_t kChunk = 16;
  double total = 0.0;
  for (std::size_t begin = 0; begin < candidates.size(); begin += kChunk) {
    const auto chunk = candidates.subspan(begin, std::min(kChunk, candidates.size() - begin));
    float values[kChunk] = {};
    for (std::size_t i = 0; i < chunk.size(); ++i) values[i] = chunk[i].logit;
    logits_to_weights(values, kChunk, scale);
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      chunk[i].weight = values[i];
      total += values[i];
    }
  }
  return total;
}

// At or below every logit whose weight reaches `min_p`, with room for rounding.
float bound_of_min_p(float min_p, float temperature, float max) {
  const double exponent = std::log(static_cast<double>(min_p));
  const double bound = max + temperature * (exponent * (1.0 + 1e-5) - 1e-5);
  return static_cast<float>(std::max<double>(bound - 1e-6 * std::abs(bound), -kLargestLogit));
}

}  // namespace

Sampler::Sampler(const SamplingParams& params, std::int32_t index, const Vocab& vocab,
                 std::span<const Token> prompt)
    : vocab_(&vocab),
      random_(params.seed, static_cast<std::uint64_t>(index)),
      temperature_(std::min(params.temperature, kLargestTemperature)),
      top_p_(params.top_p),
      min_p_(params.min_p),
      top_k_(params.top_k),
      min_tokens_(params.min_tokens),
      num_logprobs_(params.logprobs),
      ignore_eos_(params.ignore_eos),
      stop_tokens_(sorted(params.stop_token_ids)),
      adjustments_(params, vocab.size(), tokens_that_stop(params, vocab), prompt) {}

SampledToken Sampler::sample(const float* logits, SamplerScratch& scratch) const {
  const auto size = static_cast<std::size_t>(vocab_->size());
  adjustments_.collect(logits, num_generated_, scratch.overrides_);
  const LogitView view(logits, size, scratch.overrides_, scratch.starts_, scratch.buffer_);
  SampledToken result;
  result.token = choose(view, scratch);
  if (num_logprobs_ >= 0 && result.valid()) {
    const LogitView raw(logits, size, {}, scratch.starts_, scratch.buffer_);
    if (!scratch.overrides_.empty()) fill_maxima(raw, scratch.maxima_);
    result.logprobs = logprobs(raw, {result.token, logits[result.token]}, scratch);
  }
  return result;
}

void Sampler::accept(Token token) {
  adjustments_.add_output(token);
  ++num_generated_;
}

StopCause Sampler::stop_cause(Token token) const {
  if (num_generated_ < min_tokens_) return StopCause::kNone;
  const auto ends = vocab_->end_of_generation();
  if (!ignore_eos_ && std::find(ends.begin(), ends.end(), token) != ends.end()) {
    return StopCause::kEndOfGeneration;
  }
  return std::binary_search(stop_tokens_.begin(), stop_tokens_.end(), token) ? StopCause::kStopToken
                                                                             : StopCause::kNone;
}

std::size_t Sampler::work() const {
  constexpr std::size_t kMassPass = 9;  // as measured, relative to the pass for the maxima
  const bool needs_mass = temperature_ >= kGreedyTemperature && top_k_ <= 0 && !(min_p_ > 0.0F);
  const std::size_t passes =
      1 + (needs_mass ? kMassPass : 0) + (num_logprobs_ >= 0 ? kMassPass : 0);
  return passes * static_cast<std::size_t>(vocab_->size());
}

Token Sampler::choose(const LogitView& view, SamplerScratch& scratch) const {
  const float best = fill_maxima(view, scratch.maxima_);
  if (best == kNoLogit) return -1;
  if (!(temperature_ >= kGreedyTemperature)) return first_with(view, scratch.maxima_, best);
  const SoftmaxScale scale{std::min(best, kLargestLogit), 1.0F / temperature_};
  if (top_k_ > 0 && static_cast<std::size_t>(top_k_) < view.size()) {
    return draw_from_top_k(view, scale, scratch);
  }
  if (min_p_ > 0.0F) return draw_from_min_p(view, scale, scratch);
  if (top_p_ < 1.0F) return draw_from_top_p(view, scale, scratch);
  return draw_from_all(view, scale, scratch);
}

Token Sampler::draw_from_top_k(const LogitView& view, SoftmaxScale scale,
                               SamplerScratch& scratch) const {
  std::vector<Candidate>& candidates = scratch.candidates_;
  select_top(view, scratch.maxima_, static_cast<std::size_t>(top_k_), scratch.nth_, candidates);
  weigh(candidates, scale);
  const auto unlikely = [this](const Candidate& c) { return c.weight < min_p_; };
  candidates.erase(std::find_if(candidates.begin(), candidates.end(), unlikely), candidates.end());
  if (top_p_ < 1.0F) {
    double mass = top_p_ * total_weight(candidates);
    std::size_t kept = 0;
    while (kept < candidates.size() && mass > 0.0) mass -= candidates[kept++].weight;
    candidates.resize(std::max<std::size_t>(kept, 1));
  }
  return draw(candidates);
}

Token Sampler::draw_from_min_p(const LogitView& view, SoftmaxScale scale,
                               SamplerScratch& scratch) const {
  std::vector<Candidate>& candidates = scratch.candidates_;
  candidates.clear();
  gather(view, scratch.maxima_, bound_of_min_p(min_p_, temperature_, scale.max), -kNoLogit,
         candidates);
  weigh(candidates, scale);
  std::erase_if(candidates, [this](const Candidate& c) { return c.weight < min_p_; });
  if (top_p_ < 1.0F) {
    candidates.resize(keep_mass(candidates, top_p_ * total_weight(candidates)));
  }
  return draw(candidates);
}

// Gathers bands of falling logits until they hold the mass, so that only the last band needs order.
Token Sampler::draw_from_top_p(const LogitView& view, SoftmaxScale scale,
                               SamplerScratch& scratch) const {
  double missing = top_p_ * fill_masses(view, scale, scratch.masses_);
  std::vector<Candidate>& candidates = scratch.candidates_;
  candidates.clear();
  float high = -kNoLogit;
  for (float depth = 4.0F;; depth *= 2.0F) {
    const float low = depth < -kMinExponent ? scale.max - depth * temperature_ : kNoLogit;
    const std::size_t before = candidates.size();
    gather(view, scratch.maxima_, low, high, candidates);
    const std::span<Candidate> band = std::span(candidates).subspan(before);
    const double mass = weigh(band, scale);
    if (mass >= missing || low == kNoLogit) {
      candidates.resize(before + keep_mass(band, missing));
      return draw(candidates);
    }
    missing -= mass;
    high = low;
  }
}

Token Sampler::draw_from_all(const LogitView& view, SoftmaxScale scale,
                             SamplerScratch& scratch) const {
  const double total = fill_masses(view, scale, scratch.masses_);
  double target = random_.uniform(static_cast<std::uint64_t>(num_generated_)) * total;
  std::size_t chosen = 0;
  for (std::size_t b = 0; b < scratch.masses_.size(); ++b) {
    if (scratch.masses_[b] == 0.0F) continue;
    chosen = b;
    if (scratch.masses_[b] > target) break;
    target -= scratch.masses_[b];
  }
  const float* values = view.block(chosen);
  Token token = -1;
  for (std::size_t i = 0; i < kLogitBlock; ++i) {
    const float weight = scale.weight(values[i]);
    if (weight == 0.0F) continue;
    token = static_cast<Token>(chosen * kLogitBlock + i);
    if (weight > target) break;
    target -= weight;
  }
  return token;
}

Token Sampler::draw(std::span<const Candidate> candidates) const {
  double target =
      random_.uniform(static_cast<std::uint64_t>(num_generated_)) * total_weight(candidates);
  Token token = -1;
  for (const Candidate& candidate : candidates) {
    if (candidate.weight == 0.0F) continue;
    token = candidate.token;
    if (candidate.weight > target) break;
    target -= candidate.weight;
  }
  return token;
}

// scratch.maxima_ are those of `raw`.
PositionLogprobs Sampler::logprobs(const LogitView& raw, TokenLogit sampled,
                                   SamplerScratch& scratch) const {
  PositionLogprobs result{{sampled.token, kNoLogit}, {}};
  float best = kNoLogit;
  for (const float value : scratch.maxima_) best = value > best ? value : best;
  if (best == kNoLogit) return result;
  const SoftmaxScale scale{std::min(best, kLargestLogit), 1.0F};
  const double log_total =
      static_cast<double>(scale.max) + std::log(fill_masses(raw, scale, scratch.masses_));
  const auto logprob = [log_total](float logit) {
    return static_cast<float>(finite_logit(logit) - log_total);
  };
  result.sampled.logprob = logprob(sampled.logit);
  select_top(raw, scratch.maxima_, static_cast<std::size_t>(num_logprobs_), scratch.nth_,
             scratch.candidates_);
  result.top.reserve(scratch.candidates_.size());
  for (const Candidate& candidate : scratch.candidates_) {
    result.top.push_back({candidate.token, logprob(candidate.logit)});
  }
  return result;
}

}  // namespace batchcore
