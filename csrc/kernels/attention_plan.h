// Which keys the rows of a decode call attend to: read off the mask and the positions of the cells,
// once for all layers that share a cache. Pure; its owner lets one thread at a time change it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernel_set.h"

namespace batchcore::kernels {

/// The mask of a call: f16, for each stream `num_rows` rows of `num_cells`.
struct MaskView {
  const std::uint8_t* data;
  std::size_t row_stride;  ///< bytes
  std::size_t stream_stride;
  std::int64_t num_cells;
  std::int64_t num_rows;  ///< of each stream
  std::int64_t num_streams;

  [[nodiscard]] std::int64_t total_rows() const { return num_rows * num_streams; }
  [[nodiscard]] const std::uint16_t* row(std::int64_t row) const {
    return reinterpret_cast<const std::uint16_t*>(
        data + static_cast<std::size_t>(row / num_rows) * stream_stride +
        static_cast<std::size_t>(row % num_rows) * row_stride);
  }
};

class AttentionPlan {
 public:
  /// Rows of one sequence that are computed together, and the blocks that any of them sees.
  struct Tile {
    std::int64_t first_row;
    std::int32_t num_rows;
    std::int32_t begin_block;  ///< index into block_ids(); cells() has kKeyBlock for each
    std::int32_t end_block;
  };

  /// Starts a plan. `positions`, to be filled before scan(), is [num_streams][num_cells]: where in
  /// its sequence a cell is, −1 where it is empty.
  std::span<std::int32_t> begin(const MaskView& mask);

  /// Reads the rows `first`, `first + step`, ... Several threads may, each its own rows.
  void scan(const KernelSet& kernels, std::int64_t first, std::int64_t step);

  /// Divides the rows into tiles of at most `max_rows`. After scan() of all rows.
  void finish(std::int32_t max_rows);

  [[nodiscard]] bool is_for(const MaskView& mask, std::int32_t max_rows) const {
    return mask.data == mask_.data && mask.num_cells == mask_.num_cells &&
           mask.num_rows == mask_.num_rows && mask.num_streams == mask_.num_streams &&
           max_rows == max_rows_;
  }

  [[nodiscard]] std::span<const Tile> tiles() const { return tiles_; }
  [[nodiscard]] const std::int32_t* block_ids() const { return block_ids_.data(); }
  [[nodiscard]] const std::int32_t* cells() const { return cells_.data(); }
  /// Spans (kBlocksPerSpan blocks) that a tile's blocks lie in, and the blocks of each.
  [[nodiscard]] std::int32_t num_spans(const Tile& tile) const;
  [[nodiscard]] std::int32_t end_of_span(const Tile& tile, std::int32_t begin) const;

 private:
  struct Row {
    std::int32_t first_position;  // of the cells that it sees; −1 where it sees none
    std::int32_t last_position;
    std::int32_t last_cell;
  };

  [[nodiscard]] const std::uint64_t* bits(std::int64_t row) const {
    return bits_.data() + row * num_words_;
  }
  [[nodiscard]] bool sees(std::int64_t row, std::int32_t cell) const {
    return (bits(row)[cell / 64] >> (cell % 64) & 1) != 0;
  }
  void add_sequence(std::int64_t begin, std::int64_t end);
  void add_blocks(std::int64_t begin, std::int64_t end);
  void add_tile(std::int64_t begin, std::int64_t end, std::int32_t begin_block,
                std::int32_t end_block);

  struct Key {
    std::int32_t position;
    std::int32_t cell;
  };

  MaskView mask_{};
  std::int32_t max_rows_ = 0;  // of a tile; 0 = there is no plan
  std::int64_t num_words_ = 0;
  std::vector<std::int32_t> positions_;
  std::vector<std::uint64_t> bits_;  // [row][num_words_]
  std::vector<Row> rows_;
  std::vector<Key> keys_;  // scratch
  std::vector<std::uint64_t> seen_;
  bool by_position_ = true;  // of the sequence in work; else by cell
  std::vector<Tile> tiles_;
  std::vector<std::int32_t> block_ids_;
  std::vector<std::int32_t> cells_;
};

}  // namespace batchcore::kernels
