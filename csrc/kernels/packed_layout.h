// How weights lie in memory for the kernels: groups of 16 rows, in each the columns in order.
//
// A block is 16 rows × 32 columns. Its columns are eight steps of four: a step is 64 bytes, one
// byte for each of [16 rows][4 columns], which is what one multiply-add instruction of 8-bit
// integers takes. Fewer bits are stored in planes:
//
//   - 8 bits: byte 64·s + i of the plane is byte i of step s.
//   - 4 bits: byte 64·(s mod 4) + i holds steps s and s + 4, the first in its lower half.
//   - 2 bits: byte 64·(s / 4) + i holds four steps, the first in its lowest bits.
//   - 1 bit: byte i holds all eight steps, the first in its lowest bit.
//
// Weights of 3, 5 or 6 bits have a second plane, of their high bits, behind the first.
//
// The scales follow the planes, 16 of each kind, so that a group is read from one end to the other.
// Formats with 256 columns to a scale put a header before eight blocks.
//
// Shared by the packer and the kernels of every instruction set: constants only, since those are
// compiled for other CPUs than this one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchcore::kernels {

inline constexpr int kGroupRows = 16;
inline constexpr int kBlockColumns = 32;

enum class WeightFormat : std::uint8_t {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
  kF16,
  kBF16,
  kF32,
  kCount,
};
inline constexpr int kNumFormats = static_cast<int>(WeightFormat::kCount);

/// What the scales of a block are. f16 and bytes are arrays over the 16 rows.
enum class ScaleKind : std::uint8_t {
  kNone,           ///< floating-point weights
  kScale,          ///< f16 d
  kScaleMin,       ///< f16 d, f16 m: weight = d·q + m
  kSubScaleMin,    ///< header f16 d, f16 m; block u8 scale, u8 min: d·scale·q + m·min
  kSubScale,       ///< header f16 d; block i8 scale
  kSubScale16,     ///< header f16 d; block i8 scale for each half of the columns
  kSubScaleMin16,  ///< header f16 d, f16 m; block u8 (min << 4 | scale) for each half
};

struct PackedLayout {
  int low_bits;   ///< 2, 4, 8; 16 or 32 for floating-point weights
  int high_bits;  ///< 0, 1, 2
  int bias;       ///< what was added to make the quants unsigned
  ScaleKind scales;

  [[nodiscard]] constexpr bool is_float() const { return scales == ScaleKind::kNone; }
  [[nodiscard]] constexpr int columns_per_unit() const {
    return is_float() ? 1 : header_bytes() > 0 ? 256 : kBlockColumns;
  }
  [[nodiscard]] constexpr int header_bytes() const {
    switch (scales) {
      case ScaleKind::kSubScaleMin:
      case ScaleKind::kSubScaleMin16:
        return 64;
      case ScaleKind::kSubScale:
      case ScaleKind::kSubScale16:
        return 32;
      default:
        return 0;
    }
  }
  [[nodiscard]] constexpr int low_bytes() const {
    return kGroupRows * kBlockColumns * low_bits / 8;
  }
  [[nodiscard]] constexpr int high_bytes() const {
    return kGroupRows * kBlockColumns * high_bits / 8;
  }
  [[nodiscard]] constexpr int scale_bytes() const {
    switch (scales) {
      case ScaleKind::kNone:
        return 0;
      case ScaleKind::kScaleMin:
        return 64;
      case ScaleKind::kSubScale:
        return 16;
      default:
        return 32;
    }
  }
  [[nodiscard]] constexpr int block_bytes() const {
    return low_bytes() + high_bytes() + scale_bytes();
  }
  /// Bytes of 16 rows × columns_per_unit() columns.
  [[nodiscard]] constexpr int unit_bytes() const {
    return is_float() ? kGroupRows * low_bits / 8
                      : header_bytes() + columns_per_unit() / kBlockColumns * block_bytes();
  }
  [[nodiscard]] constexpr std::size_t group_bytes(std::int64_t columns) const {
    return static_cast<std::size_t>(columns / columns_per_unit()) *
           static_cast<std::size_t>(unit_bytes());
  }
};

inline constexpr PackedLayout kLayouts[kNumFormats] = {
    {4, 0, 8, ScaleKind::kScale},          // Q4_0
    {4, 0, 0, ScaleKind::kScaleMin},       // Q4_1
    {4, 1, 16, ScaleKind::kScale},         // Q5_0
    {4, 1, 0, ScaleKind::kScaleMin},       // Q5_1
    {8, 0, 128, ScaleKind::kScale},        // Q8_0
    {2, 0, 0, ScaleKind::kSubScaleMin16},  // Q2_K
    {2, 1, 4, ScaleKind::kSubScale16},     // Q3_K
    {4, 0, 0, ScaleKind::kSubScaleMin},    // Q4_K
    {4, 1, 0, ScaleKind::kSubScaleMin},    // Q5_K
    {4, 2, 32, ScaleKind::kSubScale16},    // Q6_K
    {4, 0, 128, ScaleKind::kScale},        // IQ4_NL: quants index a table of 8-bit values
    {4, 0, 128, ScaleKind::kSubScale},     // IQ4_XS: the same
    {16, 0, 0, ScaleKind::kNone},          // F16
    {16, 0, 0, ScaleKind::kNone},          // BF16
    {32, 0, 0, ScaleKind::kNone},          // F32
};

inline constexpr const PackedLayout& layout_of(WeightFormat format) {
  return kLayouts[static_cast<int>(format)];
}

/// The values of IQ4_NL and IQ4_XS by index, which the GGUF format fixes.
inline constexpr std::int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

/// 32 activations as 8-bit integers, one cache line. `d·q[i]` approximates the i-th.
struct alignas(64) ActivationBlock {
  float d;
  /// d · sum of q: over all columns in the first, or over each half of them, as the format has it.
  float scaled_sums[2];
  /// −bias · sum of q, over the same columns: what integer accumulators start from.
  std::int32_t corrections[2];
  std::int32_t unused[3];
  std::int8_t q[kBlockColumns];
};
static_assert(sizeof(ActivationBlock) == 64);

}  // namespace batchcore::kernels
