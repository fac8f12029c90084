// 256-bit vectors: 8 lanes, half a group of weight rows. With AVX-VNNI where it is there.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace batchcore::kernels {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kTileVectors = 2;
  static constexpr int kTileRows = 4;
#if defined(__AVXVNNI__)
  static constexpr bool kSignedBytes = false;
#else
  /// 8-bit weights are multiplied as signed numbers: as unsigned ones their 16-bit sums overflow.
  static constexpr bool kSignedBytes = true;
#endif

  using Float = __m256;
  using Int = __m256i;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }

  static Float load_f16(const std::uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float load_bf16(const std::uint8_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Int load_u8(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Int load_i8(const std::uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  // Bytes.
  static Int load_bytes(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Int byte(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  static Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
  /// Of 16-bit numbers, to the left; to the right where kBits is negative.
  template <int kBits>
  static Int shift(Int x) {
    if constexpr (kBits > 0) return _mm256_slli_epi16(x, kBits);
    if constexpr (kBits < 0) return _mm256_srli_epi16(x, -kBits);
    return x;
  }
  /// a | (b & mask)
  static Int or_masked(Int a, Int b, Int mask) {
    return _mm256_or_si256(a, _mm256_and_si256(b, mask));
  }
  static Int shift_right_32(Int x, int bits) { return _mm256_srli_epi32(x, bits); }
  static Int int32(int x) { return _mm256_set1_epi32(x); }
  static Int table(const std::int8_t* values) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static Int look_up(Int table, Int index) { return _mm256_shuffle_epi8(table, index); }
  static Int flip_sign(Int x) { return _mm256_xor_si256(x, byte(0x80)); }

  /// Four activations in every lane.
  static Int broadcast_activations(const std::int8_t* q) {
    std::int32_t word;
    __builtin_memcpy(&word, q, sizeof word);
    return _mm256_set1_epi32(word);
  }

  /// Sums of products of unsigned weights and signed activations, four per lane and step.
#if defined(__AVXVNNI__)
  template <int kBits>
  struct Dot {
    Int sum;
    void begin(std::int32_t correction) { sum = _mm256_set1_epi32(correction); }
    template <int kStep, int kLast>
    void add(Int weights, Int activations) {
      sum = _mm256_dpbusd_avx_epi32(sum, weights, activations);
    }
    Int total() const { return sum; }
  };
#else
  /// 16-bit sums, widened before they could overflow.
  template <int kBits>
  struct Dot {
    static constexpr int kMaxPair = 2 * 127 * ((1 << kBits) - 1);
    static constexpr int kStepsPerFlush = kBits == 8 ? 1 : 32767 / kMaxPair;
    Int sum;
    Int narrow;
    void begin(std::int32_t correction) { sum = _mm256_set1_epi32(correction); }
    template <int kStep, int kLast>
    void add(Int weights, Int activations) {
      Int pairs;
      if constexpr (kBits == 8) {  // signed weights, see kSignedBytes
        pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights));
      } else {
        pairs = _mm256_maddubs_epi16(weights, activations);
      }
      narrow = kStep % kStepsPerFlush == 0 ? pairs : _mm256_add_epi16(narrow, pairs);
      if constexpr ((kStep + 1) % kStepsPerFlush == 0 || kStep == kLast) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
      }
    }
    Int total() const { return sum; }
  };
#endif
};

}  // namespace
}  // namespace batchcore::kernels
