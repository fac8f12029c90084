// 512-bit vectors: 16 lanes, one group of weight rows.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace batchcore::kernels {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  /// Vectors × activation rows of the largest tile: 8 integer and 8 float accumulators.
  static constexpr int kTileVectors = 2;
  static constexpr int kTileRows = 4;
  static constexpr bool kSignedBytes = false;

  using Float = __m512;
  using Int = __m512i;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }

  static Float load_f16(const std::uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Float load_bf16(const std::uint8_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Int load_u8(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int load_i8(const std::uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // Bytes.
  static Int load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static Int byte(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  static Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
  /// Of 16-bit numbers, to the left; to the right where kBits is negative.
  template <int kBits>
  static Int shift(Int x) {
    if constexpr (kBits > 0) return _mm512_slli_epi16(x, kBits);
    if constexpr (kBits < 0) return _mm512_srli_epi16(x, -kBits);
    return x;
  }
  /// a | (b & mask)
  static Int or_masked(Int a, Int b, Int mask) {
    return _mm512_ternarylogic_epi32(a, b, mask, 0xf8);
  }
  static Int shift_right_32(Int x, int bits) {
    return _mm512_srli_epi32(x, static_cast<unsigned>(bits));
  }
  static Int int32(int x) { return _mm512_set1_epi32(x); }
  static Int table(const std::int8_t* values) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static Int look_up(Int table, Int index) { return _mm512_shuffle_epi8(table, index); }
  static Int flip_sign(Int x) { return _mm512_xor_si512(x, byte(0x80)); }

  /// Four activations in every lane. A load of its own: as a memory operand of the multiply-add
  /// instruction it halves the rate on Zen 4.
  static Int broadcast_activations(const std::int8_t* q) {
    std::int32_t word;
    __builtin_memcpy(&word, q, sizeof word);
    Int x = _mm512_set1_epi32(word);
    __asm__("" : "+v"(x));
    return x;
  }

  /// Sums of products of unsigned weights and signed activations, four per lane and step.
  template <int kBits>
  struct Dot {
    Int sum;
    void begin(std::int32_t correction) { sum = _mm512_set1_epi32(correction); }
    template <int kStep, int kLast>
    void add(Int weights, Int activations) {
      sum = _mm512_dpbusd_epi32(sum, weights, activations);
    }
    Int total() const { return sum; }
  };
};

}  // namespace
}  // namespace batchcore::kernels
