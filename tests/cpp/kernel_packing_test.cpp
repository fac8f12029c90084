// Packed weights decode to what the blocks of a GGUF file mean. The decoders here follow the public
// block layouts one value at a time and share nothing with the packer.
#include "kernels/packing.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "kernel_data.h"

namespace batchcore::kernels {
namespace {

using testing::all_formats;
using testing::get;
using testing::is_float;
using testing::name_of;
using testing::WeightKind;
using testing::WeightMaker;

float half(const std::uint8_t* at) {
  return static_cast<float>(testing::from_half(get<std::uint16_t>(at)));
}

int bit(const std::uint8_t* bytes, int index) { return bytes[index / 8] >> (index % 8) & 1; }

int nibble(const std::uint8_t* bytes, int index, int half_width) {
  const int byte = bytes[index / (2 * half_width) * half_width + index % half_width];
  return index / half_width % 2 == 0 ? byte & 15 : byte >> 4;
}

// The j-th 6-bit scale and min of Q4_K and Q5_K.
int scale6(const std::uint8_t* s, int j) {
  return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
}
int min6(const std::uint8_t* s, int j) {
  return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

// The j-th 6-bit scale of Q3_K, less 32.
int scale_q3(const std::uint8_t* s, int j) {
  const int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
  return (low | (s[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32;
}

constexpr int kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Value i of a block.
float decode(WeightFormat format, const std::uint8_t* b, int i) {
  const auto product = [](float scale, int q) { return scale * static_cast<float>(q); };
  switch (format) {
    case WeightFormat::kQ4_0:
      return product(half(b), nibble(b + 2, i, 16) - 8);
    case WeightFormat::kQ4_1:
      return product(half(b), nibble(b + 4, i, 16)) + half(b + 2);
    case WeightFormat::kQ5_0:
      return product(half(b), nibble(b + 6, i, 16) + 16 * bit(b + 2, i) - 16);
    case WeightFormat::kQ5_1:
      return product(half(b), nibble(b + 8, i, 16) + 16 * bit(b + 4, i)) + half(b + 2);
    case WeightFormat::kQ8_0:
      return product(half(b), static_cast<std::int8_t>(b[2 + i]));
    case WeightFormat::kQ2_K: {
      const int scale = b[i / 16];
      const int q = b[16 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
      return product(product(half(b + 80), scale & 15), q) - product(half(b + 82), scale >> 4);
    }
    case WeightFormat::kQ3_K: {
      const int low = b[32 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
      const int high = b[i % 32] >> (i / 32) & 1;
      return product(product(half(b + 108), scale_q3(b + 96, i / 16)), low - (high == 0 ? 4 : 0));
    }
    case WeightFormat::kQ4_K:
      return product(product(half(b), scale6(b + 4, i / 32)), nibble(b + 16, i, 32)) -
             product(half(b + 2), min6(b + 4, i / 32));
    case WeightFormat::kQ5_K: {
      const int q = nibble(b + 48, i, 32) + 16 * (b[16 + i % 32] >> (i / 32) & 1);
      return product(product(half(b), scale6(b + 4, i / 32)), q) -
             product(half(b + 2), min6(b + 4, i / 32));
    }
    case WeightFormat::kQ6_K: {
      const int high = b[128 + i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3;
      const int q = (nibble(b, i, 64) | high << 4) - 32;
      return product(product(half(b + 208), static_cast<std::int8_t>(b[192 + i / 16])), q);
    }
    case WeightFormat::kIQ4_NL:
      return product(half(b), kIq4[nibble(b + 2, i, 16)]);
    case WeightFormat::kIQ4_XS: {
      const int j = i / 32;
      const int scale = nibble(b + 4, j, 1) | (get<std::uint16_t>(b + 2) >> (2 * j) & 3) << 4;
      return product(product(half(b), scale - 32), kIq4[nibble(b + 8, i, 16)]);
    }
    case WeightFormat::kF16:
      return half(b);
    case WeightFormat::kBF16:
      return std::bit_cast<float>(static_cast<std::uint32_t>(get<std::uint16_t>(b)) << 16);
    case WeightFormat::kF32:
      return get<float>(b);
    case WeightFormat::kCount:
      break;
  }
  return 0.0F;
}

std::vector<float> decode_row(WeightFormat format, const std::uint8_t* row, std::int64_t columns) {
  const auto width = static_cast<std::int64_t>(layout_of(format).columns_per_unit());
  const auto bytes =
      static_cast<std::size_t>(testing::kFileScales[static_cast<int>(format)].block_bytes);
  std::vector<float> values;
  for (std::int64_t i = 0; i < columns; ++i) {
    values.push_back(decode(format, row + static_cast<std::size_t>(i / width) * bytes,
                            static_cast<int>(i % width)));
  }
  return values;
}

TEST_CASE("rows have the size that the GGUF format gives them") {
  const std::size_t of_256_columns[kNumFormats] = {144, 160, 176, 192, 272, 84,  110, 144,
                                                   176, 210, 144, 136, 512, 512, 1024};
  for (const WeightFormat format : all_formats()) {
    INFO(name_of(format));
    CHECK(file_row_bytes(format, 256) == of_256_columns[static_cast<int>(format)]);
    CHECK(file_row_bytes(format, 1024) == 4 * of_256_columns[static_cast<int>(format)]);
  }
}

TEST_CASE("what is packed decodes to what the file says") {
  WeightMaker maker(1);
  constexpr std::int64_t kColumns = 768;
  constexpr std::int64_t kRows = 41;  // two groups and nine rows of a third
  for (const WeightFormat format : all_formats()) {
    for (const WeightKind kind : testing::kAllWeightKinds) {
      CAPTURE(name_of(format));
      CAPTURE(static_cast<int>(kind));
      const auto file = maker.rows(format, kind, kRows, kColumns);
      const testing::Matrix matrix(format, kRows, kColumns, file);
      for (std::int64_t row = 0; row < kRows; ++row) {
        CAPTURE(row);
        const auto at = static_cast<std::size_t>(row) * file_row_bytes(format, kColumns);
        REQUIRE(matrix.row(row) == decode_row(format, file.data() + at, kColumns));
      }
    }
  }
}

TEST_CASE("rows that the last group lacks are zeros, whatever was in its memory") {
  WeightMaker maker(2);
  constexpr std::int64_t kColumns = 512;
  for (const WeightFormat format : all_formats()) {
    INFO(name_of(format));
    const auto file = maker.rows(format, WeightKind::kRandom, kGroupRows, kColumns);
    for (const std::int64_t num_rows : {1, 5, 15, 16}) {
      std::vector<std::uint8_t> group(layout_of(format).group_bytes(kColumns), 0xff);
      const std::size_t size =
          file_row_bytes(format, kColumns) * static_cast<std::size_t>(num_rows);
      const std::vector<std::uint8_t> rows(file.begin(), file.begin() + static_cast<long>(size));
      pack_group(format, rows.data(), num_rows, kColumns, group.data());
      std::vector<float> values(kColumns);
      for (std::int64_t row = 0; row < kGroupRows; ++row) {
        CAPTURE(row);
        unpack_row(format, group.data(), row, kColumns, values.data());
        if (row >= num_rows) {
          REQUIRE(std::all_of(values.begin(), values.end(), [](float x) { return x == 0.0F; }));
        } else {
          const auto at = static_cast<std::size_t>(row) * file_row_bytes(format, kColumns);
          REQUIRE(values == decode_row(format, rows.data() + at, kColumns));
        }
      }
    }
  }
}

TEST_CASE("packing fills a group to its last byte and no further") {
  WeightMaker maker(3);
  for (const WeightFormat format : all_formats()) {
    INFO(name_of(format));
    const auto file = maker.rows(format, WeightKind::kRandom, kGroupRows, 512);
    const std::size_t size = layout_of(format).group_bytes(512);
    std::vector<std::uint8_t> once(size + 64, 0xa5);
    std::vector<std::uint8_t> again(size + 64, 0x5a);
    pack_group(format, file.data(), kGroupRows, 512, once.data());
    pack_group(format, file.data(), kGroupRows, 512, again.data());
    CHECK(std::equal(once.begin(), once.begin() + static_cast<long>(size), again.begin()));
    CHECK(std::all_of(once.begin() + static_cast<long>(size), once.end(),
                      [](std::uint8_t byte) { return byte == 0xa5; }));
  }
}

TEST_CASE("every half-precision weight keeps its value") {
  std::vector<std::uint8_t> row(2 * 65536);
  for (std::size_t i = 0; i < 65536; ++i) testing::put(&row[2 * i], static_cast<std::uint16_t>(i));
  const testing::Matrix matrix(WeightFormat::kF16, 1, 65536, row);
  const std::vector<float> values = matrix.row(0);
  for (std::size_t i = 0; i < 65536; ++i) {
    const double expected = testing::from_half(static_cast<std::uint16_t>(i));
    const bool is_same = std::isnan(expected) ? std::isnan(values[i]) : values[i] == expected;
    REQUIRE_MESSAGE(is_same, i);
  }
}

}  // namespace
}  // namespace batchcore::kernels
