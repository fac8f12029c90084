// Activations to 8 bits, in blocks of 32 with a scale of their own. The same code, and so the same
// bits, on every instruction set.
#pragma once

#include <immintrin.h>

#include "kernels/simd/formats.h"

namespace batchcore::kernels {
namespace {

// Largest magnitude of 32 floats. As integers, since a NaN is larger than all numbers there.
inline float max_magnitude(const __m256 (&x)[4]) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i m = _mm256_setzero_si256();
  for (const __m256 part : x) {
    m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(part), magnitude));
  }
  __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
  n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(n));
}

template <WeightFormat kFormat>
void quantize(const float* row, std::int64_t columns, ActivationBlock* blocks) {
  constexpr bool kIsSigned = Quants<kFormat>::kBits == 8 && Simd::kSignedBytes;
  constexpr std::int32_t kBias = kIsSigned ? 0 : layout_of(kFormat).bias;
  constexpr bool kByHalf = Scales<kFormat>::kParts == 2;
  // Below this the reciprocal of the scale overflows; such activations count as zero.
  constexpr float kLeast = 1e-35F;
  for (std::int64_t i = 0; i < columns / kBlockColumns; ++i) {
    ActivationBlock& block = blocks[i];
    __m256 x[4];
    for (int j = 0; j < 4; ++j) x[j] = _mm256_loadu_ps(row + i * kBlockColumns + 8 * j);
    const float largest = max_magnitude(x);
    const bool is_zero = largest < kLeast;
    const __m256 inverse = _mm256_set1_ps(is_zero ? 0.0F : 127.0F / largest);
    __m256i q[4];
    for (int j = 0; j < 4; ++j) q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(x[j], inverse));
    const __m256i packed = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])),
        _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_store_si256(reinterpret_cast<__m256i*>(block.q), packed);
    // Sums of eight bytes, made unsigned by adding 128.
    const __m256i sums =
        _mm256_sad_epu8(_mm256_xor_si256(packed, _mm256_set1_epi8(static_cast<char>(0x80))),
                        _mm256_setzero_si256());
    const std::int32_t lower =
        static_cast<std::int32_t>(_mm256_extract_epi64(sums, 0) + _mm256_extract_epi64(sums, 1)) -
        2048;
    const std::int32_t upper =
        static_cast<std::int32_t>(_mm256_extract_epi64(sums, 2) + _mm256_extract_epi64(sums, 3)) -
        2048;
    const std::int32_t first = kByHalf ? lower : lower + upper;
    block.d = is_zero ? 0.0F : largest / 127.0F;
    block.scaled_sums[0] = block.d * static_cast<float>(first);
    block.scaled_sums[1] = block.d * static_cast<float>(upper);
    block.corrections[0] = -kBias * first;
    block.corrections[1] = -kBias * upper;
  }
}

}  // namespace
}  // namespace batchcore::kernels
