// Inner loops over rows of logits. Stateless; any thread.
//
// A row is worked on in blocks of kLogitBlock values. Every instruction set gives the same bits:
// sums are taken in one fixed order, and csrc/engine is compiled with -ffp-contract=off.
#pragma once

#include <cstddef>
#include <limits>

namespace batchcore {

inline constexpr std::size_t kLogitBlock = 256;
inline constexpr float kNoLogit = -std::numeric_limits<float>::infinity();
inline constexpr float kLargestLogit = std::numeric_limits<float>::max();

/// Weights below exp(kMinExponent), next to the smallest normal float, count as 0.
inline constexpr float kMinExponent = -87.0F;

/// Turns logits into unnormalised probabilities: exp((logit - max) * inverse_temperature), within
/// 2e-7 relative. 1 for the largest logit and above, 0 for NaN and below kMinExponent.
struct SoftmaxScale {
  float max = 0.0F;  ///< the row's largest logit, finite
  float inverse_temperature = 1.0F;

  [[nodiscard]] float weight(float logit) const;
};

/// Largest value of each of `num_blocks` blocks; NaN counts as kNoLogit.
void block_maxima(const float* logits, std::size_t num_blocks, float* maxima);

/// Sum of the weights of each of `num_blocks` blocks.
void block_masses(const float* logits, std::size_t num_blocks, SoftmaxScale scale, float* masses);

/// Replaces logits by their weights; `count` is a multiple of 16.
void logits_to_weights(float* values, std::size_t count, SoftmaxScale scale);

}  // namespace batchcore
