#include "kernels/packing.h"

#include <bit>
#include <cstring>

namespace batchcore::kernels {
namespace {

// Columns of one row that share a scale or a header: what a GGUF block decodes to.
struct Unit {
  std::uint8_t q[256];  // unsigned, with the bias of the layout
  std::uint16_t d;      // f16
  std::uint16_t m;
  std::uint8_t scales[16];  // of each block, or of each half block; i8 where the layout says so
  std::uint8_t mins[16];
};

struct FileBlock {
  std::int32_t bytes;
  void (*decode)(const std::uint8_t* block, Unit& unit);
};

std::uint16_t half_at(const std::uint8_t* p) {
  std::uint16_t half;
  std::memcpy(&half, p, sizeof half);
  return half;
}

std::uint16_t negated(std::uint16_t half) { return half ^ 0x8000U; }

// 16 bytes: the low halves are the first 16 quants, the high ones the rest.
void nibbles(const std::uint8_t* packed, std::uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = packed[i] & 15;
    q[i + 16] = packed[i] >> 4;
  }
}

void add_fifth_bits(const std::uint8_t* packed, std::uint8_t* q) {
  std::uint32_t bits;
  std::memcpy(&bits, packed, sizeof bits);
  for (int i = 0; i < 32; ++i) q[i] |= static_cast<std::uint8_t>(((bits >> i) & 1) << 4);
}

void decode_q4_0(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  nibbles(block + 2, unit.q);
}

void decode_q4_1(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  unit.m = half_at(block + 2);
  nibbles(block + 4, unit.q);
}

void decode_q5_0(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  nibbles(block + 6, unit.q);
  add_fifth_bits(block + 2, unit.q);
}

void decode_q5_1(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  unit.m = half_at(block + 2);
  nibbles(block + 8, unit.q);
  add_fifth_bits(block + 4, unit.q);
}

void decode_q8_0(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  for (int i = 0; i < 32; ++i) unit.q[i] = block[2 + i] ^ 0x80;
}

// Two bits: 128 columns are 32 bytes, four planes of 32 columns.
void pairs(const std::uint8_t* packed, std::uint8_t* q) {
  for (int i = 0; i < 256; ++i) {
    q[i] = (packed[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32))) & 3;
  }
}

void decode_q2_k(const std::uint8_t* block, Unit& unit) {
  for (int i = 0; i < 16; ++i) {
    unit.scales[i] = block[i] & 15;
    unit.mins[i] = block[i] >> 4;
  }
  pairs(block + 16, unit.q);
  unit.d = half_at(block + 80);
  unit.m = negated(half_at(block + 82));
}

void decode_q3_k(const std::uint8_t* block, Unit& unit) {
  pairs(block + 32, unit.q);
  for (int i = 0; i < 256; ++i) {
    unit.q[i] |= static_cast<std::uint8_t>(((block[i % 32] >> (i / 32)) & 1) << 2);
  }
  // 16 scales of 6 bits: 4 low bits in 8 bytes, 2 high bits in 4.
  const std::uint8_t* scales = block + 96;
  for (int i = 0; i < 16; ++i) {
    const int low = (scales[i % 8] >> (i / 8 * 4)) & 15;
    const int high = (scales[8 + i % 4] >> (i / 4 * 2)) & 3;
    unit.scales[i] = static_cast<std::uint8_t>((low | high << 4) - 32);
  }
  unit.d = half_at(block + 108);
}

// Eight scales and mins of 6 bits in 12 bytes.
void sub_scales(const std::uint8_t* packed, Unit& unit) {
  for (int i = 0; i < 4; ++i) {
    unit.scales[i] = packed[i] & 63;
    unit.mins[i] = packed[4 + i] & 63;
    unit.scales[4 + i] = static_cast<std::uint8_t>((packed[8 + i] & 15) | (packed[i] >> 6) << 4);
    unit.mins[4 + i] = static_cast<std::uint8_t>((packed[8 + i] >> 4) | (packed[4 + i] >> 6) << 4);
  }
}

// 64 columns are 32 bytes: the low halves first.
void nibbles_of_64(const std::uint8_t* packed, std::uint8_t* q) {
  for (int i = 0; i < 256; ++i) {
    q[i] = (packed[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4)) & 15;
  }
}

void decode_q4_k(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  unit.m = negated(half_at(block + 2));
  sub_scales(block + 4, unit);
  nibbles_of_64(block + 16, unit.q);
}

void decode_q5_k(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  unit.m = negated(half_at(block + 2));
  sub_scales(block + 4, unit);
  nibbles_of_64(block + 48, unit.q);
  for (int i = 0; i < 256; ++i) {
    unit.q[i] |= static_cast<std::uint8_t>(((block[16 + i % 32] >> (i / 32)) & 1) << 4);
  }
}

void decode_q6_k(const std::uint8_t* block, Unit& unit) {
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;  // 128 columns: 64 bytes of low bits, 32 of high ones
    const int at = i % 128;
    const int low = (block[half * 64 + at % 64] >> (at / 64 * 4)) & 15;
    const int high = (block[128 + half * 32 + at % 32] >> (at / 32 * 2)) & 3;
    unit.q[i] = static_cast<std::uint8_t>(low | high << 4);
  }
  std::memcpy(unit.scales, block + 192, 16);
  unit.d = half_at(block + 208);
}

void decode_iq4_xs(const std::uint8_t* block, Unit& unit) {
  unit.d = half_at(block);
  const std::uint16_t high = half_at(block + 2);
  for (int i = 0; i < 8; ++i) {
    const int low = (block[4 + i / 2] >> (i % 2 * 4)) & 15;
    unit.scales[i] = static_cast<std::uint8_t>((low | ((high >> (2 * i)) & 3) << 4) - 32);
    nibbles(block + 8 + 16 * i, unit.q + 32 * i);
  }
}

// In the order of WeightFormat; floating-point formats have no blocks.
constexpr FileBlock kFileBlocks[kNumFormats] = {
    {18, &decode_q4_0},  {20, &decode_q4_1},  {22, &decode_q5_0},  {24, &decode_q5_1},
    {34, &decode_q8_0},  {84, &decode_q2_k},  {110, &decode_q3_k}, {144, &decode_q4_k},
    {176, &decode_q5_k}, {210, &decode_q6_k}, {18, &decode_q4_0},  {136, &decode_iq4_xs},
    {2, nullptr},        {2, nullptr},        {4, nullptr},
};

const FileBlock& file_block(WeightFormat format) { return kFileBlocks[static_cast<int>(format)]; }

using Steps = std::uint8_t[8][64];

void write_low(const PackedLayout& layout, const Steps& steps, std::uint8_t* plane) {
  if (layout.low_bits == 8) {
    std::memcpy(plane, steps, sizeof steps);
  } else if (layout.low_bits == 4) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 64; ++i) {
        plane[64 * j + i] = static_cast<std::uint8_t>((steps[j][i] & 15) | steps[j + 4][i] << 4);
      }
    }
  } else {
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 64; ++i) {
        const auto& s = steps;
        plane[64 * j + i] =
            static_cast<std::uint8_t>((s[4 * j][i] & 3) | (s[4 * j + 1][i] & 3) << 2 |
                                      (s[4 * j + 2][i] & 3) << 4 | s[4 * j + 3][i] << 6);
      }
    }
  }
}

void write_high(const PackedLayout& layout, const Steps& steps, std::uint8_t* plane) {
  if (layout.high_bits == 1) {
    for (int i = 0; i < 64; ++i) {
      int bits = 0;
      for (int s = 0; s < 8; ++s) bits |= ((steps[s][i] >> layout.low_bits) & 1) << s;
      plane[i] = static_cast<std::uint8_t>(bits);
    }
  } else if (layout.high_bits == 2) {
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 64; ++i) {
        const auto& s = steps;
        plane[64 * j + i] = static_cast<std::uint8_t>(
            (s[4 * j][i] >> 4 & 3) | (s[4 * j + 1][i] >> 4 & 3) << 2 |
            (s[4 * j + 2][i] >> 4 & 3) << 4 | (s[4 * j + 3][i] >> 4) << 6);
      }
    }
  }
}

void put_half(std::uint8_t* p, std::uint16_t half) { std::memcpy(p, &half, sizeof half); }

void write_header(const PackedLayout& layout, const Unit& unit, int row, std::uint8_t* header) {
  if (layout.header_bytes() >= 32) put_half(header + 2 * row, unit.d);
  if (layout.header_bytes() >= 64) put_half(header + 32 + 2 * row, unit.m);
}

void write_scales(const PackedLayout& layout, const Unit& unit, int row, int block,
                  std::uint8_t* scales) {
  switch (layout.scales) {
    case ScaleKind::kNone:
      break;
    case ScaleKind::kScale:
      put_half(scales + 2 * row, unit.d);
      break;
    case ScaleKind::kScaleMin:
      put_half(scales + 2 * row, unit.d);
      put_half(scales + 32 + 2 * row, unit.m);
      break;
    case ScaleKind::kSubScaleMin:
      scales[row] = unit.scales[block];
      scales[16 + row] = unit.mins[block];
      break;
    case ScaleKind::kSubScale:
      scales[row] = unit.scales[block];
      break;
    case ScaleKind::kSubScale16:
      for (int half = 0; half < 2; ++half) scales[16 * half + row] = unit.scales[2 * block + half];
      break;
    case ScaleKind::kSubScaleMin16:
      for (int half = 0; half < 2; ++half) {
        const int at = 2 * block + half;
        scales[16 * half + row] = static_cast<std::uint8_t>(unit.mins[at] << 4 | unit.scales[at]);
      }
      break;
  }
}

void pack_float_group(const PackedLayout& layout, const std::uint8_t* rows, std::int64_t num_rows,
                      std::int64_t columns, std::uint8_t* group) {
  const auto bytes = static_cast<std::size_t>(layout.low_bits / 8);
  const std::size_t row_bytes = bytes * static_cast<std::size_t>(columns);
  for (std::int64_t k = 0; k < columns; ++k) {
    for (std::int64_t row = 0; row < kGroupRows; ++row) {
      const std::size_t to = bytes * static_cast<std::size_t>(k * kGroupRows + row);
      if (row >= num_rows) {
        std::memset(group + to, 0, bytes);
        continue;
      }
      const std::size_t from =
          static_cast<std::size_t>(row) * row_bytes + bytes * static_cast<std::size_t>(k);
      std::memcpy(group + to, rows + from, bytes);
    }
  }
}

// Quant of one row and step, four columns, as write_low() and write_high() stored them.
void read_quants(const PackedLayout& layout, const std::uint8_t* block, int row, int step,
                 std::uint8_t* q) {
  const std::uint8_t* high = block + layout.low_bytes();
  for (int i = 0; i < 4; ++i) {
    const int at = 4 * row + i;
    int value = 0;
    if (layout.low_bits == 8) {
      value = block[64 * step + at];
    } else if (layout.low_bits == 4) {
      value = (block[64 * (step % 4) + at] >> (step / 4 * 4)) & 15;
    } else {
      value = (block[64 * (step / 4) + at] >> (step % 4 * 2)) & 3;
    }
    if (layout.high_bits == 1) {
      value |= ((high[at] >> step) & 1) << layout.low_bits;
    } else if (layout.high_bits == 2) {
      value |= ((high[64 * (step / 4) + at] >> (step % 4 * 2)) & 3) << 4;
    }
    q[i] = static_cast<std::uint8_t>(value);
  }
}

float from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
  }
  // The exponent's bias differs by 112; multiplying by 2^112 is exact for subnormal numbers too.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

// weight = d·q + m for the columns of one part of a block.
struct Affine {
  float d;
  float m;
};

Affine scale_of(const PackedLayout& layout, const std::uint8_t* header, const std::uint8_t* scales,
                int row, int half) {
  const auto half_float = [row](const std::uint8_t* p) { return from_half(half_at(p + 2 * row)); };
  const int part = 16 * half + row;
  switch (layout.scales) {
    case ScaleKind::kScale:
      return {half_float(scales), 0.0F};
    case ScaleKind::kScaleMin:
      return {half_float(scales), half_float(scales + 32)};
    case ScaleKind::kSubScaleMin:
      return {half_float(header) * scales[row], half_float(header + 32) * scales[16 + row]};
    case ScaleKind::kSubScale:
      return {half_float(header) * static_cast<std::int8_t>(scales[row]), 0.0F};
    case ScaleKind::kSubScale16:
      return {half_float(header) * static_cast<std::int8_t>(scales[part]), 0.0F};
    case ScaleKind::kSubScaleMin16:
      return {half_float(header) * static_cast<float>(scales[part] & 15),
              half_float(header + 32) * static_cast<float>(scales[part] >> 4)};
    case ScaleKind::kNone:
      break;
  }
  return {1.0F, 0.0F};
}

float float_weight(WeightFormat format, const std::uint8_t* p) {
  if (format == WeightFormat::kF16) return from_half(half_at(p));
  if (format == WeightFormat::kBF16) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(half_at(p)) << 16);
  }
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

std::size_t file_row_bytes(WeightFormat format, std::int64_t columns) {
  return static_cast<std::size_t>(columns / layout_of(format).columns_per_unit()) *
         static_cast<std::size_t>(file_block(format).bytes);
}

void pack_group(WeightFormat format, const std::uint8_t* rows, std::int64_t num_rows,
                std::int64_t columns, std::uint8_t* group) {
  const PackedLayout& layout = layout_of(format);
  if (layout.is_float()) {
    pack_float_group(layout, rows, num_rows, columns, group);
    return;
  }
  const FileBlock& file = file_block(format);
  const std::size_t row_bytes = file_row_bytes(format, columns);
  const int num_blocks = layout.columns_per_unit() / kBlockColumns;
  Unit units[kGroupRows] = {};
  if (num_rows < kGroupRows) {  // zeros for what is missing: a quant of the bias, no scale
    for (std::int64_t row = num_rows; row < kGroupRows; ++row) {
      std::memset(units[row].q, layout.low_bits == 8 ? 0x80 : 0, sizeof units[row].q);
    }
  }
  for (std::int64_t unit = 0; unit < columns / layout.columns_per_unit(); ++unit) {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      file.decode(rows + static_cast<std::size_t>(row) * row_bytes +
                      static_cast<std::size_t>(unit) * static_cast<std::size_t>(file.bytes),
                  units[row]);
    }
    for (int row = 0; row < kGroupRows; ++row) write_header(layout, units[row], row, group);
    group += layout.header_bytes();
    for (int block = 0; block < num_blocks; ++block) {
      Steps steps;
      for (int row = 0; row < kGroupRows; ++row) {
        for (int step = 0; step < 8; ++step) {
          std::memcpy(steps[step] + 4 * row, units[row].q + kBlockColumns * block + 4 * step, 4);
        }
      }
      write_low(layout, steps, group);
      write_high(layout, steps, group + layout.low_bytes());
      std::uint8_t* scales = group + layout.low_bytes() + layout.high_bytes();
      for (int row = 0; row < kGroupRows; ++row) {
        write_scales(layout, units[row], row, block, scales);
      }
      group += layout.block_bytes();
    }
  }
}

void unpack_row(WeightFormat format, const std::uint8_t* matrix, std::int64_t row,
                std::int64_t columns, float* values) {
  const PackedLayout& layout = layout_of(format);
  const std::uint8_t* at =
      matrix + static_cast<std::size_t>(row / kGroupRows) * layout.group_bytes(columns);
  const auto lane = static_cast<int>(row % kGroupRows);
  if (layout.is_float()) {
    for (std::int64_t k = 0; k < columns; ++k) {
      values[k] = float_weight(format, at + lane * layout.low_bits / 8);
      at += layout.unit_bytes();
    }
    return;
  }
  const bool has_table = format == WeightFormat::kIQ4_NL || format == WeightFormat::kIQ4_XS;
  const std::uint8_t* header = at;
  for (std::int64_t column = 0; column < columns; column += kBlockColumns) {
    if (column % layout.columns_per_unit() == 0) {
      header = at;
      at += layout.header_bytes();
    }
    const std::uint8_t* scales = at + layout.low_bytes() + layout.high_bytes();
    for (int step = 0; step < 8; ++step) {
      const Affine affine = scale_of(layout, header, scales, lane, step / 4);
      std::uint8_t q[4];
      read_quants(layout, at, lane, step, q);
      for (int i = 0; i < 4; ++i) {
        const int weight = has_table ? kIq4Values[q[i]] : q[i] - layout.bias;
        values[column + 4 * step + i] = affine.d * static_cast<float>(weight) + affine.m;
      }
    }
    at += layout.block_bytes();
  }
}

}  // namespace batchcore::kernels
