// Sixteen floats, on every instruction set: one 512-bit vector or two of 256 bits. The order of
// sums across lanes is (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1) on both, so that they agree
// to the bit.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace batchcore::kernels {
namespace {

#if defined(__AVX512F__)

struct Wide {
  __m512 x;

  static Wide zero() { return {_mm512_setzero_ps()}; }
  static Wide broadcast(float v) { return {_mm512_set1_ps(v)}; }
  static Wide load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Wide load_f16(const void* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
  }
  static Wide load_bf16(const void* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, x); }

  friend Wide operator+(Wide a, Wide b) { return {_mm512_add_ps(a.x, b.x)}; }
  friend Wide operator-(Wide a, Wide b) { return {_mm512_sub_ps(a.x, b.x)}; }
  friend Wide operator*(Wide a, Wide b) { return {_mm512_mul_ps(a.x, b.x)}; }
  friend Wide operator/(Wide a, Wide b) { return {_mm512_div_ps(a.x, b.x)}; }
  static Wide fma(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  /// `b` where either is NaN.
  static Wide max(Wide a, Wide b) { return {_mm512_max_ps(a.x, b.x)}; }
  static Wide round(Wide a) { return {_mm512_roundscale_ps(a.x, 0x08)}; }
  /// The magnitude of `a` with the sign of `b`.
  static Wide with_sign(Wide a, Wide b) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000U));
    return {_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b.x), _mm512_castps_si512(a.x), 0xca))};
  }
  /// 2^n for whole n from −126 to 127.
  static Wide power_of_two(Wide n) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.x), _mm512_set1_epi32(127)), 23))};
  }
  /// `a` where x < limit is false.
  static Wide zero_below(Wide a, Wide v, float limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v.x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.x)};
  }

  [[nodiscard]] float sum() const {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  [[nodiscard]] float largest() const { return _mm512_reduce_max_ps(x); }
};

#else

struct Wide {
  __m256 x, y;

  static Wide zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Wide broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Wide load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Wide load_f16(const void* p) {
    const auto* halves = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static Wide load_bf16(const void* p) {
    const auto* halves = static_cast<const __m128i*>(p);
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, x);
    _mm256_storeu_ps(p + 8, y);
  }

  friend Wide operator+(Wide a, Wide b) {
    return {_mm256_add_ps(a.x, b.x), _mm256_add_ps(a.y, b.y)};
  }
  friend Wide operator-(Wide a, Wide b) {
    return {_mm256_sub_ps(a.x, b.x), _mm256_sub_ps(a.y, b.y)};
  }
  friend Wide operator*(Wide a, Wide b) {
    return {_mm256_mul_ps(a.x, b.x), _mm256_mul_ps(a.y, b.y)};
  }
  friend Wide operator/(Wide a, Wide b) {
    return {_mm256_div_ps(a.x, b.x), _mm256_div_ps(a.y, b.y)};
  }
  static Wide fma(Wide a, Wide b, Wide c) {
    return {_mm256_fmadd_ps(a.x, b.x, c.x), _mm256_fmadd_ps(a.y, b.y, c.y)};
  }
  /// `b` where either is NaN.
  static Wide max(Wide a, Wide b) { return {_mm256_max_ps(a.x, b.x), _mm256_max_ps(a.y, b.y)}; }
  static Wide round(Wide a) { return {_mm256_round_ps(a.x, 0x08), _mm256_round_ps(a.y, 0x08)}; }
  /// The magnitude of `a` with the sign of `b`.
  static Wide with_sign(Wide a, Wide b) {
    const __m256 sign = _mm256_set1_ps(-0.0F);
    return {_mm256_or_ps(_mm256_and_ps(sign, b.x), _mm256_andnot_ps(sign, a.x)),
            _mm256_or_ps(_mm256_and_ps(sign, b.y), _mm256_andnot_ps(sign, a.y))};
  }
  /// 2^n for whole n from −126 to 127.
  static Wide power_of_two(Wide n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.x), bias), 23)),
        _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.y), bias), 23))};
  }
  /// `a` where x < limit is false.
  static Wide zero_below(Wide a, Wide v, float limit) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(a.x, _mm256_cmp_ps(v.x, l, _CMP_NLT_UQ)),
            _mm256_and_ps(a.y, _mm256_cmp_ps(v.y, l, _CMP_NLT_UQ))};
  }

  [[nodiscard]] float sum() const {
    const __m256 a = _mm256_add_ps(x, y);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  [[nodiscard]] float largest() const {
    const __m256 a = _mm256_max_ps(x, y);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
};

#endif

// e^x for x <= 0 and NaN; exactly 0 below −87, exactly 1 at 0. Reduction by multiples of ln 2 in
// two parts (Cody and Waite), then the Taylor polynomial of degree 7 on [−ln 2 / 2, ln 2 / 2].
inline Wide exp_of_negative(Wide x) {
  const Wide clamped = Wide::max(Wide::broadcast(-87.0F), x);
  const Wide n = Wide::round(clamped * Wide::broadcast(1.44269504F));
  Wide r = Wide::fma(n, Wide::broadcast(-0.693359375F), clamped);
  r = Wide::fma(n, Wide::broadcast(2.12194440e-4F), r);
  constexpr float kCoefficients[] = {1.0F / 720, 1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F};
  Wide p = Wide::broadcast(1.0F / 5040);
  for (const float c : kCoefficients) p = Wide::fma(p, r, Wide::broadcast(c));
  return Wide::zero_below(p * Wide::power_of_two(n), x, -87.0F);
}

// (1 − e) / (1 + e) with the sign of x, where e = e^−2|x|, which neither overflows nor needs
// another exponential.
inline Wide tanh_of(Wide x) {
  const Wide zero = Wide::zero();
  const Wide magnitude = Wide::max(zero - x, x);
  const Wide e = exp_of_negative(zero - (magnitude + magnitude));
  const Wide one = Wide::broadcast(1.0F);
  return Wide::with_sign((one - e) / (one + e), x);
}

inline float exp_of_negative(float x) {
  float lanes[16];
  exp_of_negative(Wide::broadcast(x)).store(lanes);
  return lanes[0];
}

}  // namespace
}  // namespace batchcore::kernels
