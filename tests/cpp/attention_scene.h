// A KV cache in memory with rows that attend to it, for the tests of attention: masks, keys and
// values follow from sequences and positions alone, so that cells can be moved about.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernel_data.h"
#include "kernels/attention_plan.h"

namespace batchcore::kernels::testing {

inline constexpr std::uint16_t kHidden = 0xfc00;

/// A cell, or a row of queries: a position of a sequence.
struct At {
  int sequence;  ///< −1 = empty
  std::int32_t position;
};

struct Shape {
  std::int32_t key_size = 64;
  std::int32_t value_size = 64;
  std::int32_t kv_heads = 2;
  std::int32_t heads_per_kv = 3;
  CacheType type = CacheType::kF16;
  float scale = 0.125F;
  float softcap = 0.0F;
  bool has_slopes = false;  ///< ALiBi: the mask holds distances
  bool has_sinks = false;
  std::int32_t window = 0;  ///< 0 = all earlier positions are seen
};

/// How the rows are divided into tasks.
struct Division {
  std::int32_t max_rows = 16;
  std::int32_t heads_per_task = 1 << 30;
  bool splits_spans = false;
};

class CacheScene {
 public:
  CacheScene(const Shape& shape, std::vector<At> cells, std::vector<At> rows)
      : shape_(shape), cells_(std::move(cells)), rows_(std::move(rows)) {
    mask_.resize(rows_.size() * cells_.size());
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      for (std::size_t c = 0; c < cells_.size(); ++c) {
        mask_[r * cells_.size() + c] = mask_of(rows_[r], cells_[c]);
      }
    }
    fill();
  }

  [[nodiscard]] std::size_t num_heads() const {
    return static_cast<std::size_t>(shape_.kv_heads * shape_.heads_per_kv);
  }
  [[nodiscard]] std::size_t row_size() const {
    return num_heads() * static_cast<std::size_t>(shape_.value_size);
  }

  /// For each row the values of all heads, as the kernels compute them.
  [[nodiscard]] std::vector<Row> attend(const KernelSet& set, const Division& division = {}) const {
    AttentionPlan plan;
    const MaskView view{.data = reinterpret_cast<const std::uint8_t*>(mask_.data()),
                        .row_stride = 2 * cells_.size(),
                        .stream_stride = 0,
                        .num_cells = static_cast<std::int64_t>(cells_.size()),
                        .num_rows = static_cast<std::int64_t>(rows_.size()),
                        .num_streams = 1};
    std::span<std::int32_t> positions = plan.begin(view);
    for (std::size_t c = 0; c < cells_.size(); ++c) {
      positions[c] = cells_[c].sequence < 0 ? -1 : cells_[c].position;
    }
    plan.scan(set, 0, 1);
    const std::int32_t most = std::clamp(kMaxQueries / shape_.heads_per_kv, 1, 16);
    plan.finish(std::min(division.max_rows, most));
    std::vector<Row> outputs(rows_.size(), Row(row_size(), -77.0F));
    for (const AttentionPlan::Tile& tile : plan.tiles()) {
      for (std::int32_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
        const std::int32_t step = std::min(division.heads_per_task, shape_.heads_per_kv);
        for (std::int32_t head = 0; head < shape_.heads_per_kv; head += step) {
          const std::int32_t count = std::min(step, shape_.heads_per_kv - head);
          attend_tile(set, plan, tile, kv_head, head, count, division.splits_spans, outputs);
        }
      }
    }
    return outputs;
  }

  /// The same in double precision, cell by cell.
  [[nodiscard]] std::vector<double> expected(std::size_t row, std::size_t head) const {
    const std::size_t kv_head = head / static_cast<std::size_t>(shape_.heads_per_kv);
    const float* query = queries_.data() + (row * num_heads() + head) * key_width();
    std::vector<double> scores;
    std::vector<std::size_t> seen;
    double largest = -std::numeric_limits<double>::infinity();
    for (std::size_t c = 0; c < cells_.size(); ++c) {
      const std::uint16_t mask = mask_[row * cells_.size() + c];
      if (mask == kHidden) continue;
      double score = 0;
      for (std::size_t i = 0; i < key_width(); ++i) {
        score += double{query[i]} * element(key_numbers_, c, kv_head, i, key_width());
      }
      score *= double{shape_.scale};
      if (shape_.softcap != 0) score = shape_.softcap * std::tanh(score);
      score += slope(head) * from_half(mask);
      scores.push_back(score);
      seen.push_back(c);
      largest = std::max(largest, score);
    }
    if (shape_.has_sinks) largest = std::max(largest, double{sink(head)});
    double sum = shape_.has_sinks ? std::exp(sink(head) - largest) : 0.0;
    std::vector<double> values(value_width());
    for (std::size_t s = 0; s < seen.size(); ++s) {
      const double weight = std::exp(scores[s] - largest);
      sum += weight;
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] += weight * element(value_numbers_, seen[s], kv_head, i, value_width());
      }
    }
    for (double& value : values) value = sum == 0 ? 0 : value / sum;
    return values;
  }

 private:
  [[nodiscard]] std::size_t key_width() const { return static_cast<std::size_t>(shape_.key_size); }
  [[nodiscard]] std::size_t value_width() const {
    return static_cast<std::size_t>(shape_.value_size);
  }

  [[nodiscard]] std::uint16_t mask_of(const At& row, const At& cell) const {
    const std::int32_t distance = row.position - cell.position;
    const bool is_seen = cell.sequence >= 0 && cell.sequence == row.sequence && distance >= 0 &&
                         (shape_.window == 0 || distance < shape_.window);
    if (!is_seen) return kHidden;
    return shape_.has_slopes ? to_half(-static_cast<float>(distance)) : to_half(0.0F);
  }

  [[nodiscard]] float slope(std::size_t head) const {
    return shape_.has_slopes ? std::exp2(-static_cast<float>(head + 1)) : 1.0F;
  }
  [[nodiscard]] static float sink(std::size_t head) { return static_cast<float>(head) - 1.5F; }

  /// Between −1 and 1, and multiples of 1/64: every cache type holds it.
  static float number(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
    std::uint64_t x = a * 0x9e3779b97f4a7c15ULL + b * 0xbf58476d1ce4e5b9ULL + c + 1;
    x = (x ^ x >> 31) * 0x94d049bb133111ebULL;
    x ^= x >> 29;
    return static_cast<float>(static_cast<int>(x % 129) - 64) / 64.0F;
  }

  [[nodiscard]] std::size_t element_bytes() const {
    return shape_.type == CacheType::kF32 ? 4 : shape_.type == CacheType::kOther ? 1 : 2;
  }

  void put_element(std::vector<std::uint8_t>& rows, std::size_t index, float value) const {
    std::uint8_t* at = rows.data() + index * element_bytes();
    switch (shape_.type) {
      case CacheType::kF16:
        return put(at, to_half(value));
      case CacheType::kBF16:
        return put(at, to_bf16(value));
      case CacheType::kF32:
        return put(at, value);
      case CacheType::kOther:
        return put(at, static_cast<std::int8_t>(value * 64.0F));
    }
  }

  [[nodiscard]] double element(const std::vector<float>& numbers, std::size_t cell,
                               std::size_t head, std::size_t i, std::size_t width) const {
    return numbers[(cell * static_cast<std::size_t>(shape_.kv_heads) + head) * width + i];
  }

  static void bytes_to_float(const void* row, float* values, std::int64_t count) {
    const auto* bytes = static_cast<const std::int8_t*>(row);
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(bytes[i]) / 64.0F;
  }

  void fill() {
    const auto kv_heads = static_cast<std::size_t>(shape_.kv_heads);
    const std::size_t per_cell = kv_heads * element_bytes();
    const auto make = [&](std::vector<std::uint8_t>& rows, std::size_t width, int salt) {
      rows.resize(cells_.size() * width * per_cell);
      std::vector<float> numbers;
      for (const At& at : cells_) {
        for (std::size_t i = 0; i < kv_heads * width; ++i) {
          // An empty cell holds what a sequence left there.
          const float value = at.sequence < 0 ? 1.0F : number(salt + at.sequence, at.position, i);
          put_element(rows, numbers.size(), value);
          numbers.push_back(value);
        }
      }
      return numbers;
    };
    key_numbers_ = make(keys_, key_width(), 100);
    value_numbers_ = make(values_, value_width(), 200);
    for (const At& row : rows_) {
      for (std::size_t i = 0; i < num_heads() * key_width(); ++i) {
        queries_.push_back(2 * number(300 + row.sequence, row.position, i) + 0.01F);
      }
    }
  }

  [[nodiscard]] CacheRows cache_rows(const std::vector<std::uint8_t>& rows, std::size_t width,
                                     std::int32_t kv_head) const {
    const std::size_t bytes = width * element_bytes();
    return {.base = rows.data() + static_cast<std::size_t>(kv_head) * bytes,
            .stride = static_cast<std::size_t>(shape_.kv_heads) * bytes,
            .type = shape_.type,
            .to_float = &bytes_to_float};
  }

  void attend_tile(const KernelSet& set, const AttentionPlan& plan, const AttentionPlan::Tile& tile,
                   std::int32_t kv_head, std::int32_t first, std::int32_t num_heads_of_task,
                   bool splits_spans, std::vector<Row>& outputs) const {
    const auto head = static_cast<std::size_t>(kv_head * shape_.heads_per_kv + first);
    std::vector<float> slopes;
    std::vector<float> sinks;
    for (std::size_t i = head; i < num_heads(); ++i) {
      slopes.push_back(slope(i));
      sinks.push_back(sink(i));
    }
    std::vector<const std::uint16_t*> masks;
    const auto first_row = static_cast<std::size_t>(tile.first_row);
    const auto num_rows = static_cast<std::size_t>(tile.num_rows);
    for (std::size_t r = 0; r < num_rows; ++r) {
      masks.push_back(mask_.data() + (first_row + r) * cells_.size());
    }
    // What is in the memory that a task gets must not matter; a page behind it must stay as it is.
    const std::size_t scratch_size = attention_scratch(shape_.key_size, shape_.value_size);
    std::vector<float> scratch(scratch_size + 1024, std::numeric_limits<float>::quiet_NaN());
    std::vector<float> results(num_rows * row_size(), -77.0F);
    const float softcap = shape_.softcap;
    AttentionTask task{.key_size = shape_.key_size,
                       .value_size = shape_.value_size,
                       .num_rows = tile.num_rows,
                       .num_heads = num_heads_of_task,
                       .scale = shape_.scale,
                       .softcap = softcap,
                       .slopes = slopes.data(),
                       .queries = reinterpret_cast<const std::uint8_t*>(
                           queries_.data() + (first_row * num_heads() + head) * key_width()),
                       .query_row_stride = sizeof(float) * num_heads() * key_width(),
                       .query_head_stride = sizeof(float) * key_width(),
                       .keys = cache_rows(keys_, key_width(), kv_head),
                       .values = cache_rows(values_, value_width(), kv_head),
                       .cells = plan.cells() + tile.begin_block * kKeyBlock,
                       .block_ids = plan.block_ids() + tile.begin_block,
                       .num_blocks = tile.end_block - tile.begin_block,
                       .masks = masks.data(),
                       .sinks = shape_.has_sinks ? sinks.data() : nullptr,
                       .outputs = results.data(),
                       .output_row_stride = row_size(),
                       .output_head_stride = value_width(),
                       .partials = nullptr,
                       .partial_stride = 0};
    if (splits_spans) {
      attend_spans(set, plan, tile, task, scratch.data());
    } else {
      set.attend(task, scratch.data());
    }
    if (!std::all_of(scratch.begin() + static_cast<std::ptrdiff_t>(scratch_size), scratch.end(),
                     [](float x) { return std::isnan(x); })) {
      throw std::logic_error("attend() wrote behind its scratch");
    }
    for (std::size_t r = 0; r < num_rows; ++r) {
      const std::size_t count = static_cast<std::size_t>(num_heads_of_task) * value_width();
      std::memcpy(outputs[first_row + r].data() + head * value_width(),
                  results.data() + r * row_size(), sizeof(float) * count);
    }
  }

  // Each span by itself, one more than there are, then all together: as the seam does it.
  static void attend_spans(const KernelSet& set, const AttentionPlan& plan,
                           const AttentionPlan::Tile& tile, AttentionTask task, float* scratch) {
    const std::size_t size = 2 + static_cast<std::size_t>(task.value_size);
    const auto num_queries = static_cast<std::size_t>(task.num_rows * task.num_heads);
    const std::int32_t num_spans = plan.num_spans(tile) + 1;
    std::vector<float> partials(size * num_queries * static_cast<std::size_t>(num_spans),
                                std::numeric_limits<float>::quiet_NaN());
    std::int32_t begin = tile.begin_block;
    for (std::int32_t span = 0; span < num_spans; ++span) {
      const std::int32_t end = begin < tile.end_block ? plan.end_of_span(tile, begin) : begin;
      task.cells = plan.cells() + begin * kKeyBlock;
      task.block_ids = plan.block_ids() + begin;
      task.num_blocks = end - begin;
      task.partials = partials.data() + static_cast<std::size_t>(span) * num_queries * size;
      task.partial_stride = size;
      set.attend(task, scratch);
      begin = end;
    }
    for (std::size_t q = 0; q < num_queries; ++q) {
      const std::size_t head = q % static_cast<std::size_t>(task.num_heads);
      const std::size_t row = q / static_cast<std::size_t>(task.num_heads);
      set.merge(
          {.partials = partials.data() + q * size,
           .span_stride = num_queries * size,
           .num_spans = num_spans,
           .value_size = task.value_size,
           .sink = task.sinks == nullptr ? nullptr : task.sinks + head,
           .output = task.outputs + row * task.output_row_stride + head * task.output_head_stride});
    }
  }

  Shape shape_;
  std::vector<At> cells_;
  std::vector<At> rows_;
  std::vector<std::uint16_t> mask_;
  std::vector<std::uint8_t> keys_;
  std::vector<std::uint8_t> values_;
  std::vector<float> key_numbers_;  // what they stand for
  std::vector<float> value_numbers_;
  std::vector<float> queries_;
};

}  // namespace batchcore::kernels::testing
