// How each weight format is unpacked into the bytes and scales that the product tile multiplies.
#pragma once

#include "kernels/packed_layout.h"

namespace batchcore::kernels {
namespace {

// The quants of step kStep (four columns) for the lanes of one vector. `planes` points to the
// block's first byte for these lanes: `lane` is 0, or 8 for the upper half of a group.
template <WeightFormat kFormat>
struct Quants {
  static constexpr PackedLayout kLayout = layout_of(kFormat);
  static constexpr bool kHasTable =
      kFormat == WeightFormat::kIQ4_NL || kFormat == WeightFormat::kIQ4_XS;
  /// Bits of a weight as it is multiplied.
  static constexpr int kBits = kHasTable ? 8 : kLayout.low_bits + kLayout.high_bits;

  template <int kStep>
  static Simd::Int low(const std::uint8_t* plane) {
    if constexpr (kLayout.low_bits == 8) {
      return Simd::load_bytes(plane + 64 * kStep);
    } else if constexpr (kLayout.low_bits == 4) {
      const Simd::Int packed = Simd::load_bytes(plane + 64 * (kStep % 4));
      return Simd::bit_and(Simd::shift<-(kStep / 4 * 4)>(packed), Simd::byte(0x0f));
    } else {
      const Simd::Int packed = Simd::load_bytes(plane + 64 * (kStep / 4));
      return Simd::bit_and(Simd::shift<-2 * (kStep % 4)>(packed), Simd::byte(0x03));
    }
  }

  template <int kStep>
  static Simd::Int step(const std::uint8_t* block, int lane) {
    Simd::Int q = low<kStep>(block + 4 * lane);
    const std::uint8_t* high = block + kLayout.low_bytes();
    if constexpr (kLayout.high_bits > 0) {
      // These bits of each byte go above those of the low plane.
      constexpr int kSteps = 8 / kLayout.high_bits;
      constexpr int kFrom = kLayout.high_bits * (kStep % kSteps);
      constexpr int kTo = kLayout.low_bits;
      constexpr int kMask = ((1 << kLayout.high_bits) - 1) << kTo;
      const Simd::Int packed = Simd::load_bytes(high + 64 * (kStep / kSteps) + 4 * lane);
      q = Simd::or_masked(q, Simd::shift<kTo - kFrom>(packed), Simd::byte(kMask));
    }
    if constexpr (kHasTable) {
      q = Simd::look_up(Simd::table(kIq4Values), q);
      if constexpr (!Simd::kSignedBytes) q = Simd::flip_sign(q);
    } else if constexpr (kBits == 8 && Simd::kSignedBytes) {
      q = Simd::flip_sign(q);
    }
    return q;
  }
};

// What a block's sums are multiplied by, for the lanes of one vector. The header holds for the 256
// columns of a unit.
template <WeightFormat kFormat>
struct Scales {
  static constexpr PackedLayout kLayout = layout_of(kFormat);
  static constexpr ScaleKind kKind = kLayout.scales;
  static constexpr bool kHasMin = kKind == ScaleKind::kScaleMin ||
                                  kKind == ScaleKind::kSubScaleMin ||
                                  kKind == ScaleKind::kSubScaleMin16;
  /// Parts of a block's columns that have a scale of their own.
  static constexpr int kParts =
      kKind == ScaleKind::kSubScale16 || kKind == ScaleKind::kSubScaleMin16 ? 2 : 1;

  Simd::Float header_d;
  Simd::Float header_m;

  void load_header(const std::uint8_t* header, int lane) {
    if constexpr (kLayout.header_bytes() >= 32) header_d = Simd::load_f16(header + 2 * lane);
    if constexpr (kLayout.header_bytes() >= 64) header_m = Simd::load_f16(header + 32 + 2 * lane);
  }

  static const std::uint8_t* of(const std::uint8_t* block) {
    return block + kLayout.low_bytes() + kLayout.high_bytes();
  }

  Simd::Float scale(const std::uint8_t* block, int lane, int part) const {
    const std::uint8_t* scales = of(block);
    if constexpr (kKind == ScaleKind::kScale || kKind == ScaleKind::kScaleMin) {
      return Simd::load_f16(scales + 2 * lane);
    } else if constexpr (kKind == ScaleKind::kSubScaleMin) {
      return Simd::mul(header_d, Simd::to_float(Simd::load_u8(scales + lane)));
    } else if constexpr (kKind == ScaleKind::kSubScaleMin16) {
      const Simd::Int both = Simd::load_u8(scales + 16 * part + lane);
      return Simd::mul(header_d, Simd::to_float(Simd::bit_and(both, Simd::int32(15))));
    } else {
      return Simd::mul(header_d, Simd::to_float(Simd::load_i8(scales + 16 * part + lane)));
    }
  }

  Simd::Float min(const std::uint8_t* block, int lane, int part) const {
    const std::uint8_t* scales = of(block);
    if constexpr (kKind == ScaleKind::kScaleMin) {
      return Simd::load_f16(scales + 32 + 2 * lane);
    } else if constexpr (kKind == ScaleKind::kSubScaleMin) {
      return Simd::mul(header_m, Simd::to_float(Simd::load_u8(scales + 16 + lane)));
    } else {
      const Simd::Int both = Simd::load_u8(scales + 16 * part + lane);
      return Simd::mul(header_m, Simd::to_float(Simd::shift_right_32(both, 4)));
    }
  }
};

}  // namespace
}  // namespace batchcore::kernels
