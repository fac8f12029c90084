// Attention of every instruction set that this CPU executes: how exact it is, and that a row's
// result depends on the positions that it sees alone.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention_scene.h"
#include "kernels/cpu_select.h"

namespace batchcore::kernels {
namespace {

using testing::all_kernels;
using testing::At;
using testing::bits_of;
using testing::CacheScene;
using testing::name_of;
using testing::Row;
using testing::Shape;

// Positions [0, count) of a sequence.
std::vector<At> sequence_of(int sequence, std::int32_t count) {
  std::vector<At> cells;
  for (std::int32_t p = 0; p < count; ++p) cells.push_back({sequence, p});
  return cells;
}

std::vector<At> joined(std::vector<At> a, const std::vector<At>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// The last `count` positions of a sequence.
std::vector<At> last_of(int sequence, std::int32_t length, std::int32_t count) {
  std::vector<At> rows;
  for (std::int32_t p = length - count; p < length; ++p) rows.push_back({sequence, p});
  return rows;
}

void check_exact(const Shape& shape, const std::vector<At>& cells, const std::vector<At>& rows,
                 double limit = 4e-6) {
  const CacheScene scene(shape, cells, rows);
  for (const KernelSet* set : all_kernels()) {
    CAPTURE(name_of(*set));
    for (const bool splits_spans : {false, true}) {
      CAPTURE(splits_spans);
      const std::vector<Row> outputs = scene.attend(*set, {.splits_spans = splits_spans});
      for (std::size_t r = 0; r < rows.size(); ++r) {
        for (std::size_t head = 0; head < scene.num_heads(); ++head) {
          const std::vector<double> expected = scene.expected(r, head);
          for (std::size_t i = 0; i < expected.size(); ++i) {
            const double value = outputs[r][head * expected.size() + i];
            // Not "error > limit": that is false for a NaN.
            const bool is_close = std::fabs(value - expected[i]) <= limit;
            REQUIRE_MESSAGE(is_close, "row ", r, " head ", head, " value ", i, ": ", value,
                            " instead of ", expected[i]);
          }
        }
      }
    }
  }
}

TEST_CASE("attention is exact for every size and cache type") {
  for (const auto& [key_size, value_size] : std::vector<std::pair<int, int>>{{16, 16},
                                                                             {40, 40},
                                                                             {64, 64},
                                                                             {80, 80},
                                                                             {128, 128},
                                                                             {256, 256},
                                                                             {40, 72},
                                                                             {192, 128},
                                                                             {8, 24},
                                                                             {576, 512}}) {
    for (const CacheType type :
         {CacheType::kF16, CacheType::kBF16, CacheType::kF32, CacheType::kOther}) {
      CAPTURE(key_size);
      CAPTURE(static_cast<int>(type));
      const Shape shape{.key_size = key_size,
                        .value_size = value_size,
                        .kv_heads = 2,
                        .heads_per_kv = 2,
                        .type = type,
                        .scale = 1.0F / std::sqrt(static_cast<float>(key_size))};
      check_exact(shape, sequence_of(0, 75), last_of(0, 75, 5));
    }
  }
}

TEST_CASE("attention is exact with every option") {
  const Shape plain;
  Shape capped = plain;
  capped.softcap = 3.0F;
  Shape slopes = plain;
  slopes.has_slopes = true;
  Shape sinks = plain;
  sinks.has_sinks = true;
  Shape window = plain;
  window.window = 37;
  Shape all = window;
  all.softcap = 5.0F;
  all.has_slopes = true;
  all.has_sinks = true;
  Shape many_heads = plain;
  many_heads.kv_heads = 1;
  many_heads.heads_per_kv = 16;
  int index = 0;
  for (const Shape& shape : {plain, capped, slopes, sinks, window, all, many_heads}) {
    CAPTURE(index++);
    check_exact(shape, joined(sequence_of(0, 140), sequence_of(1, 50)),
                joined(last_of(0, 140, 20), last_of(1, 50, 3)));
    check_exact(shape, sequence_of(0, 1100), last_of(0, 1100, 1));  // three spans
  }
}

TEST_CASE("attention is exact with scores so far apart that one key takes all") {
  Shape shape;
  shape.scale = 30.0F;
  // Single precision holds scores of several hundred to 3e-5.
  check_exact(shape, sequence_of(0, 200), last_of(0, 200, 4), 1e-4);
  shape.has_sinks = true;
  check_exact(shape, sequence_of(0, 600), last_of(0, 600, 4), 1e-4);
}

TEST_CASE("a row that sees nothing gets zeros") {
  for (const bool has_sinks : {false, true}) {
    Shape shape;
    shape.has_sinks = has_sinks;
    const std::vector<At> rows = {{7, 0}, {0, 10}, {0, 11}, {7, 1}, {7, 2}};
    check_exact(shape, sequence_of(0, 40), rows);
    const CacheScene scene(shape, sequence_of(0, 40), rows);
    for (const KernelSet* set : all_kernels()) {
      for (const bool splits_spans : {false, true}) {
        const std::vector<Row> outputs = scene.attend(*set, {.splits_spans = splits_spans});
        for (const std::size_t r : {std::size_t{0}, std::size_t{3}, std::size_t{4}}) {
          CHECK(bits_of(outputs[r]) == bits_of(Row(scene.row_size(), 0.0F)));
        }
      }
    }
  }
}

// Every shape whose code differs.
std::vector<Shape> shapes_of_bits() {
  std::vector<Shape> shapes;
  for (const auto& [type, size] :
       std::vector<std::pair<CacheType, std::int32_t>>{{CacheType::kF16, 64},
                                                       {CacheType::kF16, 40},
                                                       {CacheType::kF16, 256},
                                                       {CacheType::kBF16, 80},
                                                       {CacheType::kF32, 40},
                                                       {CacheType::kF32, 128},
                                                       {CacheType::kOther, 80}}) {
    Shape shape;
    shape.type = type;
    shape.key_size = size;
    shape.value_size = size;
    shapes.push_back(shape);
  }
  Shape shape;
  shape.softcap = 4.0F;
  shape.has_sinks = true;
  shape.heads_per_kv = 5;
  shapes.push_back(shape);
  shape.has_slopes = true;
  shape.window = 100;
  shapes.push_back(shape);
  return shapes;
}

TEST_CASE("a row has the same bits in any tile, with any heads, spans split or not, on any set") {
  constexpr std::int32_t kLength = 600;
  const std::vector<At> cells = sequence_of(0, kLength);
  const std::vector<At> rows = last_of(0, kLength, 19);
  for (const Shape& shape : shapes_of_bits()) {
    CAPTURE(shape.key_size);
    CAPTURE(static_cast<int>(shape.type));
    const CacheScene scene(shape, cells, rows);
    std::vector<Row> first;
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      if (first.empty()) first = scene.attend(*set);
      for (const std::int32_t max_rows : {16, 1, 5}) {
        for (const std::int32_t heads : {5, 2}) {
          for (const bool splits_spans : {false, true}) {
            CAPTURE(max_rows);
            CAPTURE(heads);
            CAPTURE(splits_spans);
            const std::vector<Row> outputs = scene.attend(*set, {max_rows, heads, splits_spans});
            for (std::size_t r = 0; r < rows.size(); ++r) {
              CAPTURE(r);
              REQUIRE(bits_of(outputs[r]) == bits_of(first[r]));
            }
          }
        }
      }
      for (const std::size_t r : {std::size_t{0}, std::size_t{11}, std::size_t{18}}) {  // alone
        const CacheScene alone(shape, cells, {rows[r]});
        CHECK(bits_of(alone.attend(*set)[0]) == bits_of(first[r]));
      }
    }
  }
}

TEST_CASE("a row has the same bits wherever its cells are and whatever is between them") {
  constexpr std::int32_t kLength = 700;
  const std::vector<At> rows = last_of(3, kLength, 6);
  const std::vector<At> own = sequence_of(3, kLength);
  std::mt19937 random(1);
  std::vector<At> shuffled = own;
  std::shuffle(shuffled.begin(), shuffled.end(), random);
  std::vector<At> crowded = own;  // with holes, and as many cells of two other sequences
  for (std::int32_t p = 0; p < 400; ++p) {
    crowded.push_back({4, p});
    crowded.push_back({p % 3 == 0 ? -1 : 5, p});
  }
  std::shuffle(crowded.begin(), crowded.end(), random);
  std::vector<At> wrapped(own.begin() + 300, own.end());  // the ring of a sliding window
  wrapped.insert(wrapped.end(), own.begin(), own.begin() + 300);
  for (const Shape& shape : shapes_of_bits()) {
    CAPTURE(shape.key_size);
    CAPTURE(static_cast<int>(shape.type));
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const std::vector<Row> first = CacheScene(shape, own, rows).attend(*set);
      const auto check = [&](const std::vector<At>& cells, std::vector<At> with_others,
                             std::size_t from) {
        const std::vector<Row> outputs =
            CacheScene(shape, cells, std::move(with_others)).attend(*set);
        for (std::size_t r = 0; r < rows.size(); ++r) {
          CAPTURE(r);
          CHECK(bits_of(outputs[from + r]) == bits_of(first[r]));
        }
      };
      check(shuffled, rows, 0);
      check(wrapped, rows, 0);
      check(crowded, rows, 0);
      check(crowded, joined({{4, 399}, {5, 200}, {5, 202}}, joined(rows, {{4, 17}})), 3);
    }
  }
}

TEST_CASE("a longer history beyond the window changes no bit") {
  Shape shape;
  shape.window = 90;
  const std::vector<At> rows = last_of(0, 900, 5);
  const std::vector<At> all = sequence_of(0, 900);
  const std::vector<At> recent(all.begin() + 780, all.end());
  for (const KernelSet* set : all_kernels()) {
    const std::vector<Row> a = CacheScene(shape, all, rows).attend(*set);
    const std::vector<Row> b = CacheScene(shape, recent, rows).attend(*set);
    for (std::size_t r = 0; r < rows.size(); ++r) CHECK(bits_of(a[r]) == bits_of(b[r]));
  }
}

TEST_CASE("every set reads a mask of any length alike") {
  std::mt19937 random(2);
  for (const std::int64_t num_cells : {1, 2, 31, 32, 63, 64, 65, 127, 128, 200, 256, 1000}) {
    const auto count = static_cast<std::size_t>(num_cells);
    std::vector<std::uint16_t> mask(count);
    std::vector<std::uint64_t> expected((count + 63) / 64);
    for (std::size_t i = 0; i < count; ++i) {
      constexpr std::uint16_t kValues[] = {0xfc00, 0x0000, 0x8000, 0xfbff, 0x7c00, 0xc500};
      mask[i] = kValues[random() % 6];
      if (mask[i] != 0xfc00) expected[i / 64] |= std::uint64_t{1} << (i % 64);
    }
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      std::vector<std::uint64_t> bits(expected.size(), 0x5a5a5a5a5a5a5a5aULL);
      set->scan_mask({mask.data(), num_cells, bits.data()});
      CHECK(bits == expected);
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
