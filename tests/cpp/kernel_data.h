// Inputs for the tests of the kernels: weights as a GGUF file has them, with every extreme that a
// block can hold, activations, and the products of both in double precision.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu_select.h"
#include "kernels/packing.h"

namespace batchcore::kernels::testing {

inline constexpr const char* kFormatNames[kNumFormats] = {
    "Q4_0", "Q4_1", "Q5_0",   "Q5_1",   "Q8_0", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16",  "BF16", "F32"};

inline std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> formats;
  for (int i = 0; i < kNumFormats; ++i) formats.push_back(static_cast<WeightFormat>(i));
  return formats;
}

inline std::string name_of(WeightFormat format) { return kFormatNames[static_cast<int>(format)]; }
inline std::string name_of(const KernelSet& set) { return set.name; }

inline bool is_float(WeightFormat format) { return layout_of(format).is_float(); }

/// Every set that this CPU executes.
inline std::vector<const KernelSet*> all_kernels() {
  std::vector<const KernelSet*> sets;
  for (const KernelSet* const* set = usable_kernels(); *set != nullptr; ++set) {
    sets.push_back(*set);
  }
  return sets;
}

inline const FormatKernels& kernels_of(const KernelSet& set, WeightFormat format) {
  return set.formats[static_cast<int>(format)];
}

/// The half that is nearest to `value`, ties to even; finite values only.
inline std::uint16_t to_half(float value) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude < 0x1p-14) {  // subnormal: multiples of 2^-24
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::nearbyint(magnitude * 0x1p24)));
  }
  int exponent;
  const double fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  const int mantissa = static_cast<int>(std::nearbyint(fraction * 2048)) - 1024;
  return static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + mantissa));
}

inline double from_half(std::uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  double value =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  }
  return (half & 0x8000) != 0 ? -value : value;
}

inline std::uint16_t to_bf16(float value) {  // cut off: which number it becomes doesn't matter here
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}

template <typename T>
void put(std::uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

template <typename T>
T get(const std::uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

enum class WeightKind {
  kRandom,
  kOnes,         ///< every bit of quants and sub-scales set
  kZeros,        ///< and cleared
  kLargest,      ///< 0x7f: the largest signed byte
  kSmallest,     ///< 0x80: the smallest
  kAlternating,  ///< 0x80 and 0x7f by turns
  kDenormal,     ///< random quants with scales that are subnormal halves
  kZeroScale,    ///< random quants with scales of zero
};
inline constexpr WeightKind kAllWeightKinds[] = {
    WeightKind::kRandom,   WeightKind::kOnes,        WeightKind::kZeros,    WeightKind::kLargest,
    WeightKind::kSmallest, WeightKind::kAlternating, WeightKind::kDenormal, WeightKind::kZeroScale};

/// Where a block of a GGUF file has its f16 scales; −1 = none.
struct FileScales {
  int block_bytes;
  int d;
  int m;
};
inline constexpr FileScales kFileScales[kNumFormats] = {
    {18, 0, -1},  {20, 0, 2},     {22, 0, -1}, {24, 0, 2},  {34, 0, -1},
    {84, 80, 82}, {110, 108, -1}, {144, 0, 2}, {176, 0, 2}, {210, 208, -1},
    {18, 0, -1},  {136, 0, -1},   {2, -1, -1}, {2, -1, -1}, {4, -1, -1}};

class WeightMaker {
 public:
  explicit WeightMaker(unsigned seed) : random_(seed) {}

  /// Rows as in a GGUF file, one after the other.
  std::vector<std::uint8_t> rows(WeightFormat format, WeightKind kind, std::int64_t num_rows,
                                 std::int64_t columns) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(num_rows) *
                                    file_row_bytes(format, columns));
    const FileScales scales = kFileScales[static_cast<int>(format)];
    const auto step = static_cast<std::size_t>(scales.block_bytes);
    for (std::size_t at = 0; at < bytes.size(); at += step) {
      std::uint8_t* block = bytes.data() + at;
      if (is_float(format)) {
        put_float(format, block, float_weight(kind, at / step));
        continue;
      }
      for (std::size_t i = 0; i < step; ++i) block[i] = byte(kind, i);
      put(block + scales.d, scale(kind));
      if (scales.m >= 0) put(block + scales.m, scale(kind));
    }
    return bytes;
  }

 private:
  std::uint8_t byte(WeightKind kind, std::size_t index) {
    switch (kind) {
      case WeightKind::kOnes:
        return 0xff;
      case WeightKind::kZeros:
        return 0x00;
      case WeightKind::kLargest:
        return 0x7f;
      case WeightKind::kSmallest:
        return 0x80;
      case WeightKind::kAlternating:
        return index % 2 == 0 ? 0x80 : 0x7f;
      default:
        return static_cast<std::uint8_t>(random_());
    }
  }

  std::uint16_t scale(WeightKind kind) {
    if (kind == WeightKind::kZeroScale) return 0;
    if (kind == WeightKind::kDenormal) return static_cast<std::uint16_t>(random_() % 1023 + 1);
    const float size = std::uniform_real_distribution<float>(0.002F, 0.02F)(random_);
    return to_half(random_() % 4 == 0 ? -size : size);
  }

  float float_weight(WeightKind kind, std::size_t index) {
    switch (kind) {
      case WeightKind::kOnes:
      case WeightKind::kLargest:
        return 60000.0F;
      case WeightKind::kSmallest:
        return -60000.0F;
      case WeightKind::kAlternating:
        return index % 2 == 0 ? 1000.0F : -1000.0F;
      case WeightKind::kDenormal:
        return static_cast<float>(random_() % 1023 + 1) * 0x1p-24F;
      case WeightKind::kZeros:
      case WeightKind::kZeroScale:
        return 0.0F;
      default:
        return std::normal_distribution<float>(0.0F, 0.1F)(random_);
    }
  }

  static void put_float(WeightFormat format, std::uint8_t* at, float value) {
    if (format == WeightFormat::kF16) {
      put(at, to_half(value));
    } else if (format == WeightFormat::kBF16) {
      put(at, to_bf16(value));
    } else {
      put(at, value);
    }
  }

  std::mt19937 random_;
};

/// A packed matrix.
struct Matrix {
  WeightFormat format;
  std::int64_t num_outputs;
  std::int64_t columns;
  std::vector<std::uint8_t> packed;

  Matrix(WeightFormat of, std::int64_t outputs, std::int64_t width,
         const std::vector<std::uint8_t>& rows)
      : format(of), num_outputs(outputs), columns(width) {
    const std::size_t bytes = layout_of(format).group_bytes(columns);
    packed.resize(static_cast<std::size_t>(num_groups()) * bytes);
    for (std::int64_t group = 0; group < num_groups(); ++group) {
      const std::int64_t first = group * kGroupRows;
      pack_group(format,
                 rows.data() + static_cast<std::size_t>(first) * file_row_bytes(format, columns),
                 std::min<std::int64_t>(kGroupRows, num_outputs - first), columns,
                 packed.data() + static_cast<std::size_t>(group) * bytes);
    }
  }

  [[nodiscard]] std::int64_t num_groups() const {
    return (num_outputs + kGroupRows - 1) / kGroupRows;
  }

  [[nodiscard]] std::vector<float> row(std::int64_t index) const {
    std::vector<float> values(static_cast<std::size_t>(columns));
    unpack_row(format, packed.data(), index, columns, values.data());
    return values;
  }
};

using Row = std::vector<float>;

/// The bits of floats: NaNs compare equal, zeros of different sign don't.
inline std::vector<std::uint32_t> bits_of(const Row& row) {
  std::vector<std::uint32_t> bits(row.size());
  if (!row.empty()) std::memcpy(bits.data(), row.data(), sizeof(float) * row.size());
  return bits;
}

inline Row gaussian_row(std::mt19937& random, std::int64_t columns, float size = 1.0F) {
  std::normal_distribution<float> normal(0.0F, size);
  Row row(static_cast<std::size_t>(columns));
  for (float& x : row) x = normal(random);
  return row;
}

inline std::vector<Row> gaussian_rows(std::mt19937& random, std::int64_t count,
                                      std::int64_t columns) {
  std::vector<Row> rows;
  for (std::int64_t i = 0; i < count; ++i) rows.push_back(gaussian_row(random, columns));
  return rows;
}

/// Activations as multiply() takes them.
class Activations {
 public:
  Activations(const KernelSet& set, WeightFormat format, const std::vector<Row>& rows)
      : floats_(rows) {
    auto* const quantize = kernels_of(set, format).quantize;
    for (const Row& row : floats_) {
      if (quantize == nullptr) {
        pointers_.push_back(row.data());
        continue;
      }
      blocks_.emplace_back(row.size() / kBlockColumns);
      quantize(row.data(), static_cast<std::int64_t>(row.size()), blocks_.back().data());
    }
    for (const auto& blocks : blocks_) pointers_.push_back(blocks.data());
  }
  Activations(const Activations&) = delete;

  [[nodiscard]] const void* const* pointers() const { return pointers_.data(); }
  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(pointers_.size()); }
  [[nodiscard]] const std::vector<std::vector<ActivationBlock>>& blocks() const { return blocks_; }

 private:
  std::vector<Row> floats_;
  std::vector<std::vector<ActivationBlock>> blocks_;
  std::vector<const void*> pointers_;
};

/// Some rows times some groups; what isn't computed stays `outputs`.
inline void multiply(const KernelSet& set, const Matrix& matrix, const Activations& activations,
                     std::int64_t first_row, std::int64_t num_rows, std::int64_t begin_group,
                     std::int64_t end_group, std::vector<Row>& outputs) {
  std::vector<float*> pointers;
  for (Row& row : outputs) pointers.push_back(row.data());
  kernels_of(set, matrix.format)
      .multiply({.weights = matrix.packed.data(),
                 .columns = matrix.columns,
                 .num_outputs = matrix.num_outputs,
                 .begin_group = begin_group,
                 .end_group = end_group,
                 .activations = activations.pointers() + first_row,
                 .outputs = pointers.data() + first_row,
                 .num_rows = num_rows});
}

inline std::vector<Row> blank_outputs(std::int64_t num_rows, std::int64_t num_outputs) {
  return {static_cast<std::size_t>(num_rows), Row(static_cast<std::size_t>(num_outputs), -77.0F)};
}

inline std::vector<Row> multiply_all(const KernelSet& set, const Matrix& matrix,
                                     const std::vector<Row>& rows) {
  const Activations activations(set, matrix.format, rows);
  std::vector<Row> outputs = blank_outputs(activations.size(), matrix.num_outputs);
  multiply(set, matrix, activations, 0, activations.size(), 0, matrix.num_groups(), outputs);
  return outputs;
}

}  // namespace batchcore::kernels::testing
