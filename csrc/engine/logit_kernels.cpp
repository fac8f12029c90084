#include "engine/logit_kernels.h"

#include <cstdint>
#include <cstring>

// A portable build carries wider kernels beside the baseline ones and asks the CPU which it has.
// Done by hand rather than with target_clones: that needs ifunc (glibc only), breaks under
// sanitizers, and its auto-vectorised loops were 3 to 5 times slower than explicit vectors.
#if defined(__GNUC__)
#define BATCHCORE_INLINE __attribute__((always_inline)) inline
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a real call
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wvector-conversion"
#endif
#else
#define BATCHCORE_INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define BATCHCORE_X86_KERNELS 1
#endif

namespace batchcore {
namespace {

// Partial results of a block, whatever the width of the machine's vectors: this fixes the order of
// sums, and with it the bits of the result.
constexpr std::size_t kLanes = 16;
static_assert(kLogitBlock % kLanes == 0);

struct Scalar {
  using Floats = float;
  using Bits = std::uint32_t;
};

#if defined(__GNUC__)
struct Vector128 {
  using Floats = float __attribute__((vector_size(16)));
  using Bits = std::uint32_t __attribute__((vector_size(16)));
};
struct Vector256 {
  using Floats = float __attribute__((vector_size(32)));
  using Bits = std::uint32_t __attribute__((vector_size(32)));
};
struct Vector512 {
  using Floats = float __attribute__((vector_size(64)));
  using Bits = std::uint32_t __attribute__((vector_size(64)));
};
using Baseline = Vector128;
#else
using Baseline = Scalar;
#endif

template <typename To, typename From>
BATCHCORE_INLINE To copy_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector>
BATCHCORE_INLINE typename Vector::Floats load(const float* from) {
  typename Vector::Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

template <typename Vector>
BATCHCORE_INLINE typename Vector::Floats weights(const typename Vector::Floats& logits, float max,
                                                 float inverse_temperature) {
  using Floats = typename Vector::Floats;
  using Bits = typename Vector::Bits;
  const Floats zero = {};
  const Floats lowest = zero + kMinExponent;
  const Floats z = (logits - max) * inverse_temperature;
  const Floats not_above = z < zero ? z : zero;
  const Floats x = not_above > lowest ? not_above : lowest;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  const Floats shifted = x * 1.44269504F + 12582912.0F;
  const Floats n = shifted - 12582912.0F;
  const Floats r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
  // exp(r) = 1 + r + r^2 q(r), q interpolated at Chebyshev nodes over |r| <= ln(2) / 2.
  Floats q = zero + 1.3926184e-3F;
  q = q * r + 8.3631791e-3F;
  q = q * r + 4.1666555e-2F;
  q = q * r + 1.6666577e-1F;
  q = q * r + 0.5F;
  const Floats power = 1.0F + (r + r * r * q);
  const Bits exponent = (copy_bits<Bits>(shifted) + 127U) << 23U;
  const Floats result = power * copy_bits<Floats>(exponent);
  return z >= lowest ? result : zero;
}

template <typename Vector>
BATCHCORE_INLINE void maxima_kernel(const float* logits, std::size_t num_blocks, float* maxima) {
  using Floats = typename Vector::Floats;
  constexpr std::size_t kWidth = sizeof(Floats) / sizeof(float);
  constexpr std::size_t kParts = kLanes / kWidth;
  for (std::size_t b = 0; b < num_blocks; ++b) {
    const float* block = logits + b * kLogitBlock;
    Floats best[kParts];
    for (std::size_t p = 0; p < kParts; ++p) best[p] = Floats{} + kNoLogit;
    for (std::size_t i = 0; i < kLogitBlock; i += kLanes) {
      for (std::size_t p = 0; p < kParts; ++p) {
        const Floats values = load<Vector>(block + i + p * kWidth);
        best[p] = values > best[p] ? values : best[p];
      }
    }
    float lane[kLanes];
    std::memcpy(lane, best, sizeof(lane));
    for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
      for (std::size_t l = 0; l < width; ++l) {
        lane[l] = lane[l + width] > lane[l] ? lane[l + width] : lane[l];
      }
    }
    maxima[b] = lane[0];
  }
}

template <typename Vector>
BATCHCORE_INLINE void masses_kernel(const float* logits, std::size_t num_blocks, float max,
                                    float inverse_temperature, float* masses) {
  using Floats = typename Vector::Floats;
  constexpr std::size_t kWidth = sizeof(Floats) / sizeof(float);
  constexpr std::size_t kParts = kLanes / kWidth;
  for (std::size_t b = 0; b < num_blocks; ++b) {
    const float* block = logits + b * kLogitBlock;
    Floats sum[kParts];
    for (std::size_t p = 0; p < kParts; ++p) sum[p] = Floats{};
    for (std::size_t i = 0; i < kLogitBlock; i += kLanes) {
      for (std::size_t p = 0; p < kParts; ++p) {
        sum[p] += weights<Vector>(load<Vector>(block + i + p * kWidth), max, inverse_temperature);
      }
    }
    float lane[kLanes];
    std::memcpy(lane, sum, sizeof(lane));
    for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
      for (std::size_t l = 0; l < width; ++l) lane[l] += lane[l + width];
    }
    masses[b] = lane[0];
  }
}

#if defined(BATCHCORE_X86_KERNELS)
__attribute__((target("avx2"))) void maxima_avx2(const float* logits, std::size_t num_blocks,
                                                 float* maxima) {
  maxima_kernel<Vector256>(logits, num_blocks, maxima);
}
__attribute__((target("avx512f"))) void maxima_avx512(const float* logits, std::size_t num_blocks,
                                                      float* maxima) {
  maxima_kernel<Vector512>(logits, num_blocks, maxima);
}
__attribute__((target("avx2"))) void masses_avx2(const float* logits, std::size_t num_blocks,
                                                 float max, float inverse_temperature,
                                                 float* masses) {
  masses_kernel<Vector256>(logits, num_blocks, max, inverse_temperature, masses);
}
__attribute__((target("avx512f"))) void masses_avx512(const float* logits, std::size_t num_blocks,
                                                      float max, float inverse_temperature,
                                                      float* masses) {
  masses_kernel<Vector512>(logits, num_blocks, max, inverse_temperature, masses);
}
#endif

}  // namespace

float SoftmaxScale::weight(float logit) const {
  return weights<Scalar>(logit, max, inverse_temperature);
}

void block_maxima(const float* logits, std::size_t num_blocks, float* maxima) {
#if defined(BATCHCORE_X86_KERNELS)
  if (__builtin_cpu_supports("avx512f")) return maxima_avx512(logits, num_blocks, maxima);
  if (__builtin_cpu_supports("avx2")) return maxima_avx2(logits, num_blocks, maxima);
#endif
  maxima_kernel<Baseline>(logits, num_blocks, maxima);
}

void block_masses(const float* logits, std::size_t num_blocks, SoftmaxScale scale, float* masses) {
  const float max = scale.max;
  const float inverse = scale.inverse_temperature;
#if defined(BATCHCORE_X86_KERNELS)
  if (__builtin_cpu_supports("avx512f")) {
    return masses_avx512(logits, num_blocks, max, inverse, masses);
  }
  if (__builtin_cpu_supports("avx2")) {
    return masses_avx2(logits, num_blocks, max, inverse, masses);
  }
#endif
  masses_kernel<Baseline>(logits, num_blocks, max, inverse, masses);
}

// Baseline vectors only: candidates are few as a rule.
void logits_to_weights(float* values, std::size_t count, SoftmaxScale scale) {
  constexpr std::size_t kWidth = sizeof(Baseline::Floats) / sizeof(float);
  for (std::size_t i = 0; i < count; i += kWidth) {
    const auto result =
        weights<Baseline>(load<Baseline>(values + i), scale.max, scale.inverse_temperature);
    std::memcpy(values + i, &result, sizeof(result));
  }
}

}  // namespace batchcore
