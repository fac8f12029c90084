// Attention over KV cells, as plain data: what one call of a kernel computes.
//
// Keys are taken in blocks of 32 positions (block b holds positions 32b to 32b + 31) and blocks in
// spans of 512 positions. Both are fixed by positions alone, never by cells, rows or threads, so
// that a row's sums have one order. A position that a row does not see weighs exactly 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchcore::kernels {

inline constexpr int kKeyBlock = 32;
inline constexpr int kBlocksPerSpan = 16;
/// Query vectors (rows × heads) of one task at most.
inline constexpr int kMaxQueries = 64;

/// One row of an f16 mask: which of its cells are not −infinity.
struct MaskScan {
  const std::uint16_t* mask;
  std::int64_t num_cells;
  std::uint64_t* bits;  ///< out: ceil(num_cells / 64) words
};

enum class CacheType : std::uint8_t { kF16, kBF16, kF32, kOther };

/// K or V of one head: a row for each cell.
struct CacheRows {
  const std::uint8_t* base;
  std::size_t stride;  ///< bytes from cell to cell
  CacheType type;
  /// For kOther: decodes a row of `count` values.
  void (*to_float)(const void* row, float* values, std::int64_t count);
};

/// What a query has over a span of keys: the largest score, Σ exp(score − max), and
/// Σ exp(score − max)·value. `max` is −infinity where it sees none.
struct PartialHeader {
  float max;
  float sum;
};

/// Some rows of one sequence × some heads that share K and V, over blocks of keys.
struct AttentionTask {
  std::int32_t key_size;
  std::int32_t value_size;
  std::int32_t num_rows;
  std::int32_t num_heads;  ///< num_rows × num_heads <= kMaxQueries
  float scale;
  float softcap;        ///< 0 = none
  const float* slopes;  ///< of each head, what the mask is multiplied by
  const std::uint8_t* queries;
  std::size_t query_row_stride;  ///< bytes
  std::size_t query_head_stride;
  CacheRows keys;
  CacheRows values;
  const std::int32_t* cells;      ///< [num_blocks][kKeyBlock], −1 where no cell holds the position
  const std::int32_t* block_ids;  ///< [num_blocks], ascending: position / kKeyBlock
  std::int32_t num_blocks;
  const std::uint16_t* const* masks;  ///< of each row, by cell; null = every cell is seen
  const float* sinks;                 ///< of each head, or null
  float* outputs;
  std::size_t output_row_stride;  ///< floats
  std::size_t output_head_stride;
  /// If not null, the blocks are one span and the result goes here instead of into outputs:
  /// [num_rows · num_heads] of PartialHeader and value_size floats, partial_stride floats apart.
  float* partials;
  std::size_t partial_stride;
};

/// Floats of scratch that a task needs.
[[nodiscard]] constexpr std::size_t attention_scratch(std::int32_t key_size,
                                                      std::int32_t value_size) {
  const auto keys = static_cast<std::size_t>((key_size + 15) / 16 * 16);
  const auto values = static_cast<std::size_t>((value_size + 15) / 16 * 16);
  const std::size_t longest = keys < values ? values : keys;
  return kMaxQueries * (keys + 2 * values + kKeyBlock + 8) + kKeyBlock * (keys + values) + longest;
}

/// Joins the partial results of one query over spans in ascending order.
struct MergeTask {
  const float* partials;  ///< PartialHeader and value_size floats, for each span
  std::size_t span_stride;
  std::int32_t num_spans;
  std::int32_t value_size;
  const float* sink;  ///< or null
  float* output;
};

}  // namespace batchcore::kernels
