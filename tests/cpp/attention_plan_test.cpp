// Which rows and keys attention takes together: literal expectations for small masks.
#include "kernels/attention_plan.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "kernel_data.h"

namespace batchcore::kernels {
namespace {

void scan_one_by_one(const MaskScan& scan) {
  for (std::int64_t i = 0; i < (scan.num_cells + 63) / 64; ++i) scan.bits[i] = 0;
  for (std::int64_t i = 0; i < scan.num_cells; ++i) {
    if (scan.mask[i] != 0xfc00) scan.bits[i / 64] |= std::uint64_t{1} << (i % 64);
  }
}

// Kernels on any CPU, as far as a plan needs them.
const KernelSet& plain_kernels() {
  static const KernelSet set{"plain", {}, &scan_one_by_one, nullptr, nullptr, nullptr};
  return set;
}

// A mask drawn as text: a string for each row, 'x' = the row sees the cell.
struct Drawing {
  std::vector<std::uint16_t> mask;
  MaskView view{};

  explicit Drawing(const std::vector<std::string>& rows, std::int64_t num_streams = 1) {
    for (const std::string& row : rows) {
      for (const char c : row) mask.push_back(c == 'x' ? 0 : 0xfc00);
    }
    const auto num_cells = static_cast<std::int64_t>(rows.front().size());
    const std::int64_t num_rows = static_cast<std::int64_t>(rows.size()) / num_streams;
    view = {.data = reinterpret_cast<const std::uint8_t*>(mask.data()),
            .row_stride = 2 * static_cast<std::size_t>(num_cells),
            .stream_stride = 2 * static_cast<std::size_t>(num_cells * num_rows),
            .num_cells = num_cells,
            .num_rows = num_rows,
            .num_streams = num_streams};
  }
};

void make(AttentionPlan& plan, const Drawing& drawing, const std::vector<std::int32_t>& positions,
          std::int32_t max_rows) {
  const std::span<std::int32_t> to = plan.begin(drawing.view);
  REQUIRE(to.size() == positions.size());
  std::copy(positions.begin(), positions.end(), to.begin());
  // As two threads would.
  plan.scan(plain_kernels(), 1, 2);
  plan.scan(plain_kernels(), 0, 2);
  plan.finish(max_rows);
}

// "rows 0-1: 0[0:4 1:5] 2[3:6]": rows 0 and 1; of block 0 the positions 0 and 1 are in the cells 4
// and 5, of block 2 the fourth one in cell 6.
std::string text_of(const AttentionPlan& plan) {
  std::ostringstream out;
  for (const AttentionPlan::Tile& tile : plan.tiles()) {
    if (tile.first_row > 0) out << "; ";
    out << "rows " << tile.first_row << "-" << tile.first_row + tile.num_rows - 1 << ":";
    for (std::int32_t block = tile.begin_block; block < tile.end_block; ++block) {
      out << " " << plan.block_ids()[block] << "[";
      const char* space = "";
      for (int i = 0; i < kKeyBlock; ++i) {
        const std::int32_t cell = plan.cells()[block * kKeyBlock + i];
        if (cell >= 0) {
          out << space << i << ":" << cell;
          space = " ";
        }
      }
      out << "]";
    }
  }
  return out.str();
}

std::string plan_of(const std::vector<std::string>& rows,
                    const std::vector<std::int32_t>& positions, std::int32_t max_rows = 16,
                    std::int64_t num_streams = 1) {
  AttentionPlan plan;
  make(plan, Drawing(rows, num_streams), positions, max_rows);
  return text_of(plan);
}

TEST_CASE("rows of one sequence are a tile") {
  CHECK(plan_of({"xx....", "xxx...", "xxxx.."}, {0, 1, 2, 3, -1, -1}) ==
        "rows 0-2: 0[0:0 1:1 2:2 3:3]");
}

TEST_CASE("tiles hold as many rows as they may, and share the blocks of their sequence") {
  CHECK(plan_of({"x...", "xx..", "xxx.", "xxxx"}, {0, 1, 2, 3}, 3) ==
        "rows 0-2: 0[0:0 1:1 2:2 3:3]; rows 3-3: 0[0:0 1:1 2:2 3:3]");
}

TEST_CASE("two sequences in one call are two tiles, each with its own cells") {
  CHECK(plan_of({"x.x...", "x.xx..", ".x..x.", ".x..xx"}, {0, 0, 1, 2, 1, 2}) ==
        "rows 0-1: 0[0:0 1:2 2:3]; rows 2-3: 0[0:1 1:4 2:5]");
}

TEST_CASE("two sequences that share a prefix are two tiles") {
  CHECK(plan_of({"xxx..", "xx.x.", "xx.xx"}, {0, 1, 2, 2, 3}) ==
        "rows 0-0: 0[0:0 1:1 2:2]; rows 1-2: 0[0:0 1:1 2:3 3:4]");
}

TEST_CASE("keys are in the order of positions, wherever their cells are") {
  CHECK(plan_of({"xxxx"}, {33, 1, 32, 0}) == "rows 0-0: 0[0:3 1:1] 1[0:2 1:0]");
}

TEST_CASE("a tile has the blocks that its rows see, not those of the whole sequence") {
  // Windows of two positions, 31 apart.
  CHECK(plan_of({"xx..", ".xx.", "..xx"}, {0, 31, 62, 93}, 1) ==
        "rows 0-0: 0[0:0 31:1]; rows 1-1: 0[0:0 31:1] 1[30:2]; rows 2-2: 1[30:2] 2[29:3]");
}

TEST_CASE("blocks without a key are left out") {
  CHECK(plan_of({"xxx"}, {5, 100, 1000}) == "rows 0-0: 0[5:0] 3[4:1] 31[8:2]");
}

TEST_CASE("keys at one position are taken by cell") {
  CHECK(plan_of({"xxx.x"}, {7, 7, 8, -1, 9}) == "rows 0-0: 0[0:0 1:1 2:2 4:4]");
  CHECK(plan_of({"xxx"}, {-1, 4, 5}) == "rows 0-0: 0[0:0 1:1 2:2]");
}

TEST_CASE("another sequence is by position although one before it is by cell") {
  CHECK(plan_of({"xx..", "..xx"}, {3, 3, 41, 40}) == "rows 0-0: 0[0:0 1:1]; rows 1-1: 1[8:3 9:2]");
}

TEST_CASE("a row that sees nothing is a tile without blocks") {
  CHECK(plan_of({"...", "xx.", "..."}, {0, 1, -1}) == "rows 0-0:; rows 1-1: 0[0:0 1:1]; rows 2-2:");
}

TEST_CASE("rows of two streams are never one tile") {
  CHECK(plan_of({"xx", "xx"}, {0, 1, 0, 1}, 16, 2) == "rows 0-0: 0[0:0 1:1]; rows 1-1: 0[0:0 1:1]");
}

TEST_CASE("spans begin at multiples of 512 positions") {
  AttentionPlan plan;
  make(plan, Drawing({"xxxxx"}), {0, 511, 512, 1000, 5000}, 16);
  REQUIRE(plan.tiles().size() == 1);
  const AttentionPlan::Tile tile = plan.tiles()[0];
  CHECK(tile.end_block - tile.begin_block == 5);
  CHECK(plan.num_spans(tile) == 3);
  CHECK(plan.end_of_span(tile, 0) == 2);
  CHECK(plan.end_of_span(tile, 2) == 4);
  CHECK(plan.end_of_span(tile, 4) == 5);
}

TEST_CASE("a plan serves its mask until another is begun, and can be made anew") {
  AttentionPlan plan;
  const Drawing first({"xx.", "xxx"});
  const Drawing second({"x"});
  make(plan, first, {0, 1, 2}, 4);
  CHECK(plan.is_for(first.view, 4));
  CHECK_FALSE(plan.is_for(first.view, 8));
  CHECK_FALSE(plan.is_for(second.view, 4));
  plan.begin(first.view);
  CHECK_FALSE(plan.is_for(first.view, 4));
  make(plan, second, {40}, 4);
  CHECK(text_of(plan) == "rows 0-0: 1[8:0]");
}

TEST_CASE("more than 64 cells, on every instruction set") {
  std::string row(200, '.');
  std::vector<std::int32_t> positions(200, -1);
  row[63] = row[64] = row[199] = 'x';
  positions[63] = 2;
  positions[64] = 1;
  positions[199] = 0;
  CHECK(plan_of({row}, positions) == "rows 0-0: 0[0:199 1:64 2:63]");
  for (const KernelSet* set : testing::all_kernels()) {
    AttentionPlan plan;
    const Drawing drawing({row});
    const std::span<std::int32_t> to = plan.begin(drawing.view);
    std::copy(positions.begin(), positions.end(), to.begin());
    plan.scan(*set, 0, 1);
    plan.finish(16);
    CHECK(text_of(plan) == "rows 0-0: 0[0:199 1:64 2:63]");
  }
}

}  // namespace
}  // namespace batchcore::kernels
