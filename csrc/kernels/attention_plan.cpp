#include "kernels/attention_plan.h"

#include <algorithm>
#include <bit>

namespace batchcore::kernels {

std::span<std::int32_t> AttentionPlan::begin(const MaskView& mask) {
  mask_ = mask;
  max_rows_ = 0;
  num_words_ = (mask.num_cells + 63) / 64;
  const auto num_rows = static_cast<std::size_t>(mask.total_rows());
  positions_.resize(static_cast<std::size_t>(mask.num_streams * mask.num_cells));
  bits_.resize(num_rows * static_cast<std::size_t>(num_words_));
  rows_.resize(num_rows);
  tiles_.clear();
  block_ids_.clear();
  cells_.clear();
  return positions_;
}

void AttentionPlan::scan(const KernelSet& kernels, std::int64_t first, std::int64_t step) {
  for (std::int64_t i = first; i < mask_.total_rows(); i += step) {
    std::uint64_t* words = bits_.data() + i * num_words_;
    kernels.scan_mask({mask_.row(i), mask_.num_cells, words});
    const std::int32_t* positions = positions_.data() + i / mask_.num_rows * mask_.num_cells;
    Row row{-1, -1, -1};
    for (std::int64_t w = 0; w < num_words_; ++w) {
      for (std::uint64_t word = words[w]; word != 0; word &= word - 1) {
        const auto cell = static_cast<std::int32_t>(64 * w + std::countr_zero(word));
        const std::int32_t position = positions[cell];
        if (row.first_position < 0 || position < row.first_position) row.first_position = position;
        if (position > row.last_position) {
          row.last_position = position;
          row.last_cell = cell;
        }
      }
    }
    rows_[static_cast<std::size_t>(i)] = row;
  }
}

// Rows that follow one another belong to one sequence where each sees the last cell of the one
// before: the cell of a row's own token is seen by its sequence only.
void AttentionPlan::finish(std::int32_t max_rows) {
  max_rows_ = max_rows;
  for (std::int64_t stream = 0; stream < mask_.num_streams; ++stream) {
    const std::int64_t end = (stream + 1) * mask_.num_rows;
    std::int64_t begin = stream * mask_.num_rows;
    for (std::int64_t row = begin + 1; row <= end; ++row) {
      if (row < end) {
        const std::int32_t last = rows_[static_cast<std::size_t>(row - 1)].last_cell;
        if (last >= 0 && sees(row, last)) continue;
      }
      add_sequence(begin, row);
      begin = row;
    }
  }
}

void AttentionPlan::add_sequence(std::int64_t begin, std::int64_t end) {
  const auto begin_block = static_cast<std::int32_t>(block_ids_.size());
  add_blocks(begin, end);
  const auto end_block = static_cast<std::int32_t>(block_ids_.size());
  for (std::int64_t row = begin; row < end; row += max_rows_) {
    add_tile(row, std::min<std::int64_t>(row + max_rows_, end), begin_block, end_block);
  }
}

// The cells that any of the rows sees, in blocks by position.
void AttentionPlan::add_blocks(std::int64_t begin, std::int64_t end) {
  seen_.assign(bits(begin), bits(begin) + num_words_);
  for (std::int64_t row = begin + 1; row < end; ++row) {
    for (std::int64_t w = 0; w < num_words_; ++w) {
      seen_[static_cast<std::size_t>(w)] |= bits(row)[w];
    }
  }
  const std::int32_t* positions = positions_.data() + begin / mask_.num_rows * mask_.num_cells;
  keys_.clear();
  bool is_sorted = true;
  for (std::int64_t w = 0; w < num_words_; ++w) {
    for (std::uint64_t word = seen_[static_cast<std::size_t>(w)]; word != 0; word &= word - 1) {
      const auto cell = static_cast<std::int32_t>(64 * w + std::countr_zero(word));
      const Key key{positions[cell], cell};
      is_sorted = is_sorted && (keys_.empty() || keys_.back().position < key.position);
      keys_.push_back(key);
    }
  }
  if (!is_sorted) {
    std::sort(keys_.begin(), keys_.end(),
              [](const Key& a, const Key& b) { return a.position < b.position; });
  }
  const auto same = std::adjacent_find(keys_.begin(), keys_.end(), [](const Key& a, const Key& b) {
    return a.position == b.position;
  });
  // Positions that say nothing (several tokens of an image, cells without one): order by cell.
  by_position_ = same == keys_.end() && (keys_.empty() || keys_.front().position >= 0);
  if (!by_position_) {
    for (Key& key : keys_) key.position = key.cell;
    std::sort(keys_.begin(), keys_.end(),
              [](const Key& a, const Key& b) { return a.position < b.position; });
  }
  const auto first = static_cast<std::ptrdiff_t>(block_ids_.size());
  for (const Key& key : keys_) {
    const std::int32_t id = key.position / kKeyBlock;
    if (static_cast<std::ptrdiff_t>(block_ids_.size()) == first || block_ids_.back() != id) {
      block_ids_.push_back(id);
      cells_.resize(cells_.size() + kKeyBlock, -1);
    }
    cells_[cells_.size() - kKeyBlock + static_cast<std::size_t>(key.position % kKeyBlock)] =
        key.cell;
  }
}

void AttentionPlan::add_tile(std::int64_t begin, std::int64_t end, std::int32_t begin_block,
                             std::int32_t end_block) {
  if (by_position_) {
    std::int32_t first = INT32_MAX;
    std::int32_t last = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      const Row& row = rows_[static_cast<std::size_t>(i)];
      if (row.last_cell < 0) continue;
      first = std::min(first, row.first_position / kKeyBlock);
      last = std::max(last, row.last_position / kKeyBlock);
    }
    const auto from = block_ids_.begin() + begin_block;
    const auto to = block_ids_.begin() + end_block;
    end_block = static_cast<std::int32_t>(std::upper_bound(from, to, last) - block_ids_.begin());
    begin_block =
        last < 0
            ? end_block
            : static_cast<std::int32_t>(std::lower_bound(from, to, first) - block_ids_.begin());
  }
  tiles_.push_back({begin, static_cast<std::int32_t>(end - begin), begin_block, end_block});
}

std::int32_t AttentionPlan::end_of_span(const Tile& tile, std::int32_t begin) const {
  const auto at = static_cast<std::size_t>(begin);
  std::int32_t end = begin;
  while (end < tile.end_block && block_ids_[static_cast<std::size_t>(end)] / kBlocksPerSpan ==
                                     block_ids_[at] / kBlocksPerSpan) {
    ++end;
  }
  return end;
}

std::int32_t AttentionPlan::num_spans(const Tile& tile) const {
  std::int32_t count = 0;
  for (std::int32_t b = tile.begin_block; b < tile.end_block; b = end_of_span(tile, b)) ++count;
  return count;
}

}  // namespace batchcore::kernels
