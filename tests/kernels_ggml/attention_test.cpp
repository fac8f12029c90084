// FLASH_ATTN_EXT over a registered cache: computed by our kernels, no less exact than by ggml, with
// the same bits on any number of threads and wherever cells are.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "ggml_graph.h"

namespace batchcore::kernels {
namespace {

using testing::bits_of;
using testing::floats_of;
using testing::Graph;
using testing::our_weights;
using testing::Row;

struct At {
  int sequence;  // −1 = an empty cell
  std::int32_t position;
};

// As a KV cache tells them. Counts how often it is asked.
class Positions final : public CellPositions {
 public:
  Positions(std::vector<std::vector<At>> streams, int& num_reads)
      : streams_(std::move(streams)), num_reads_(num_reads) {}

  void read(std::int32_t first_stream, std::int32_t num_streams, std::int32_t num_cells,
            std::span<std::int32_t> positions) override {
    ++num_reads_;
    for (std::int32_t s = 0; s < num_streams; ++s) {
      const auto& cells = streams_[static_cast<std::size_t>(first_stream + s)];
      for (std::int32_t c = 0; c < num_cells; ++c) {
        const At at = cells[static_cast<std::size_t>(c)];
        positions[static_cast<std::size_t>(s * num_cells + c)] = at.sequence < 0 ? -1 : at.position;
      }
    }
  }

 private:
  std::vector<std::vector<At>> streams_;
  int& num_reads_;
};

// Attention of some rows over cells, in every stream the same number of both.
struct Attention {
  std::vector<std::vector<At>> cells;  // of each stream
  std::vector<std::vector<At>> rows;
  ggml_type type = GGML_TYPE_F16;
  std::int64_t size = 64;
  std::int64_t num_heads = 4;
  std::int64_t kv_heads = 2;
  float max_bias = 0.0F;
  float softcap = 0.0F;
  bool has_sinks = false;
  int num_layers = 1;

  int num_reads = 0;

  [[nodiscard]] std::int64_t num_streams() const { return static_cast<std::int64_t>(cells.size()); }
  [[nodiscard]] std::int64_t num_cells() const {
    return static_cast<std::int64_t>(cells[0].size());
  }
  [[nodiscard]] std::int64_t num_rows() const { return static_cast<std::int64_t>(rows[0].size()); }
  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(size)); }

  // Numbers of a position of a sequence, whatever the cell.
  static Row numbers(unsigned kind, const At& at, std::int64_t count) {
    std::mt19937 random(kind + 10 * static_cast<unsigned>(at.sequence + 1) +
                        1000 * static_cast<unsigned>(at.position + 1));
    return testing::gaussian_row(random, count);
  }

  // K (kind 1) or V (kind 2): [size · kv_heads][cells][streams].
  [[nodiscard]] std::vector<std::uint8_t> cache(unsigned kind) const {
    const std::int64_t width = size * kv_heads;
    Row values;
    for (const auto& stream : cells) {
      for (const At& at : stream) {
        const Row row = numbers(kind, at, width);
        values.insert(values.end(), row.begin(), row.end());
      }
    }
    const std::int64_t count = num_streams() * num_cells();
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count) * ggml_row_size(type, width));
    ggml_quantize_chunk(type, values.data(), bytes.data(), 0, count, width, nullptr);
    return bytes;
  }

  [[nodiscard]] Row queries() const {  // [size][heads][rows][streams]
    Row values;
    for (const auto& stream : rows) {
      for (const At& at : stream) {
        const Row row = numbers(3, at, size * num_heads);
        values.insert(values.end(), row.begin(), row.end());
      }
    }
    return values;
  }

  [[nodiscard]] std::vector<std::uint16_t> mask() const {
    std::vector<std::uint16_t> mask;
    for (std::size_t stream = 0; stream < rows.size(); ++stream) {
      for (const At& row : rows[stream]) {
        for (const At& cell : cells[stream]) {
          const bool is_seen = cell.sequence == row.sequence && cell.position <= row.position;
          const auto distance = static_cast<float>(row.position - cell.position);
          mask.push_back(!is_seen          ? 0xfc00
                         : max_bias > 0.0F ? testing::to_half(-distance)
                                           : std::uint16_t{0});
        }
      }
    }
    return mask;
  }

  ggml_tensor* view(Graph& graph, ggml_tensor* cache) const {
    const std::size_t row = ggml_row_size(type, size);
    const std::size_t cell = row * static_cast<std::size_t>(kv_heads);
    return ggml_view_4d(graph.context(), cache, size, num_cells(), kv_heads, num_streams(), cell,
                        row, cell * static_cast<std::size_t>(num_cells()), 0);
  }

  // [size][heads][rows][streams], of each layer.
  Row compute(bool is_ours, int num_threads) {
    Graph graph;
    ggml_context* context = graph.context();
    ggml_tensor* mask_tensor =
        ggml_new_tensor_4d(context, GGML_TYPE_F16, num_cells(), num_rows(), 1, num_streams());
    const auto mask_values = mask();
    std::memcpy(mask_tensor->data, mask_values.data(), ggml_nbytes(mask_tensor));
    std::vector<ggml_tensor*> outputs;
    std::vector<const void*> layers;
    for (int layer = 0; layer < num_layers; ++layer) {
      const std::vector<std::int64_t> shape = {size * kv_heads, num_cells(), num_streams()};
      ggml_tensor* k = graph.weights(nullptr, type, shape, cache(1));
      ggml_tensor* v = graph.weights(nullptr, type, shape, cache(2));
      layers.push_back(k);
      ggml_tensor* q = graph.floats({size, num_heads, num_rows(), num_streams()}, queries());
      q = ggml_permute(context, q, 0, 2, 1, 3);
      outputs.push_back(ggml_flash_attn_ext(context, q, view(graph, k), view(graph, v), mask_tensor,
                                            scale(), max_bias, softcap));
      if (has_sinks) {
        std::mt19937 random(9);
        ggml_flash_attn_ext_add_sinks(
            outputs.back(), graph.floats({num_heads}, testing::gaussian_row(random, num_heads)));
      }
    }
    if (!is_ours) return graph.compute(outputs, num_threads);
    const CacheScope scope(layers, std::make_unique<Positions>(cells, num_reads));
    return graph.compute(outputs, num_threads);
  }

  [[nodiscard]] std::vector<double> expected() const {
    const std::int64_t width = size * kv_heads;
    const std::int64_t count = width * num_cells() * num_streams();
    const Row k = floats_of(type, cache(1).data(), count);
    const Row v = floats_of(type, cache(2).data(), count);
    const Row q = queries();
    const auto masks = mask();
    std::mt19937 random(9);
    const Row sinks = testing::gaussian_row(random, num_heads);
    std::vector<double> result;
    for (std::int64_t i = 0; i < num_streams() * num_rows() * num_heads; ++i) {
      const std::int64_t head = i % num_heads;
      const std::int64_t row = i / num_heads;
      const std::int64_t first = row / num_rows() * num_cells();
      const std::int64_t at = head / (num_heads / kv_heads) * size;
      // Heads are a power of two here: slopes are a geometric series.
      const double slope = max_bias > 0 ? std::exp2(-max_bias / static_cast<double>(num_heads) *
                                                    static_cast<double>(head + 1))
                                        : 1.0;
      double sum = has_sinks ? std::exp(double{sinks[static_cast<std::size_t>(head)]}) : 0.0;
      std::vector<double> values(static_cast<std::size_t>(size));
      for (std::int64_t cell = 0; cell < num_cells(); ++cell) {
        const std::uint16_t m = masks[static_cast<std::size_t>(row * num_cells() + cell)];
        if (m == 0xfc00) continue;
        const float* key = k.data() + (first + cell) * width + at;
        const float* value = v.data() + (first + cell) * width + at;
        double score = 0;
        for (std::int64_t j = 0; j < size; ++j) score += double{q[i * size + j]} * double{key[j]};
        score *= scale();
        if (softcap != 0) score = softcap * std::tanh(score / softcap);
        const double weight = std::exp(score + slope * testing::from_half(m));
        sum += weight;
        for (std::size_t j = 0; j < values.size(); ++j) values[j] += weight * value[j];
      }
      for (const double value : values) result.push_back(sum == 0 ? 0 : value / sum);
    }
    return result;
  }
};

std::vector<At> sequence_of(int sequence, std::int32_t begin, std::int32_t end) {
  std::vector<At> cells;
  for (std::int32_t p = begin; p < end; ++p) cells.push_back({sequence, p});
  return cells;
}

std::vector<At> joined(std::vector<At> a, const std::vector<At>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// In one call: rows of a sequence of `length` positions and a row of one of 40.
Attention two_sequences(std::int32_t length) {
  Attention attention;
  attention.cells = {joined(joined(sequence_of(0, 0, length), sequence_of(1, 0, 40)), {{-1, 0}})};
  attention.rows = {joined(sequence_of(0, length - 3, length), {{1, 39}})};
  return attention;
}

double error_of(const Row& values, const std::vector<double>& expected) {
  REQUIRE(values.size() == expected.size());
  double sum = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) sum += std::pow(values[i] - expected[i], 2);
  return std::sqrt(sum / static_cast<double>(expected.size()));
}

TEST_CASE("attention over a registered cache is ours, and ggml's where it isn't registered") {
  if (our_weights() == nullptr) return;
  Attention attention = two_sequences(100);
  const Row ours = attention.compute(true, 1);
  CHECK(attention.num_reads == 1);
  const Row stock = attention.compute(false, 1);
  CHECK(attention.num_reads == 1);
  CHECK(bits_of(ours) != bits_of(stock));
  attention.num_layers = 3;  // all see the plan of the first
  const Row layers = attention.compute(true, 2);
  CHECK(attention.num_reads == 2);
  REQUIRE(layers.size() == 3 * ours.size());
  for (std::size_t layer = 0; layer < 3; ++layer) {
    const auto begin = layers.begin() + static_cast<std::ptrdiff_t>(layer * ours.size());
    CHECK(bits_of(Row(begin, begin + static_cast<std::ptrdiff_t>(ours.size()))) == bits_of(ours));
  }
}

TEST_CASE("attention is no less exact than ggml's, for every cache type and option") {
  if (our_weights() == nullptr) return;
  std::vector<Attention> all;
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q8_0,
                               GGML_TYPE_Q4_0, GGML_TYPE_Q5_1}) {
    all.push_back(two_sequences(150));
    all.back().type = type;
  }
  for (const std::int64_t size : {80, 128, 256}) {
    all.push_back(two_sequences(150));
    all.back().size = size;
  }
  all.push_back(two_sequences(150));
  all.back().softcap = 5.0F;
  all.push_back(two_sequences(150));
  all.back().max_bias = 8.0F;
  all.push_back(two_sequences(150));
  all.back().has_sinks = true;
  all.push_back(two_sequences(700));
  for (std::size_t i = 0; i < all.size(); ++i) {
    CAPTURE(i);
    const auto expected = all[i].expected();
    const double ours = error_of(all[i].compute(true, 1), expected);
    const double stock = error_of(all[i].compute(false, 1), expected);
    CAPTURE(ours);
    CAPTURE(stock);
    const bool is_no_worse = ours <= stock + 1e-7;
    CHECK(is_no_worse);
    CHECK(all[i].num_reads == 1);
  }
}

TEST_CASE("attention has the same bits on any number of threads, spans divided or not") {
  if (our_weights() == nullptr) return;
  for (const std::int32_t length : {60, 600, 1700}) {
    CAPTURE(length);
    Attention attention = two_sequences(length);
    const Row first = attention.compute(true, 1);
    CHECK(error_of(first, attention.expected()) < 1e-6);
    for (const int num_threads : {2, 3}) {
      for (int run = 0; run < 3; ++run) {  // threads take other items each time
        CHECK(bits_of(attention.compute(true, num_threads)) == bits_of(first));
      }
    }
  }
}

TEST_CASE("attention has the same bits wherever cells are, in one stream or in two") {
  if (our_weights() == nullptr) return;
  Attention alone;
  alone.cells = {sequence_of(0, 0, 90)};
  alone.rows = {sequence_of(0, 85, 90)};
  const Row expected = alone.compute(true, 1);

  Attention crowd = alone;
  crowd.cells = {joined(alone.cells[0], sequence_of(1, 0, 70))};
  std::mt19937 random(1);
  std::shuffle(crowd.cells[0].begin(), crowd.cells[0].end(), random);
  crowd.rows = {joined(alone.rows[0], sequence_of(1, 66, 70))};
  Row values = crowd.compute(true, 2);
  values.resize(expected.size());
  CHECK(bits_of(values) == bits_of(expected));

  Attention streams = alone;
  streams.cells = {joined(sequence_of(1, 0, 85), std::vector<At>(5, {-1, 0})), alone.cells[0]};
  streams.rows = {sequence_of(1, 80, 85), alone.rows[0]};
  values = streams.compute(true, 3);
  CHECK(error_of(values, streams.expected()) < 1e-6);
  values.erase(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(expected.size()));
  CHECK(bits_of(values) == bits_of(expected));
}

}  // namespace
}  // namespace batchcore::kernels
