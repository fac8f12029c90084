// Matrix products of every instruction set that this CPU executes: a result depends on its row of
// activations and its row of weights alone, to the bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "kernel_data.h"
#include "kernels/kernel_set.h"

namespace batchcore::kernels {
namespace {

using testing::Activations;
using testing::all_formats;
using testing::all_kernels;
using testing::bits_of;
using testing::blank_outputs;
using testing::gaussian_row;
using testing::gaussian_rows;
using testing::is_float;
using testing::Matrix;
using testing::multiply;
using testing::multiply_all;
using testing::name_of;
using testing::Row;
using testing::WeightKind;
using testing::WeightMaker;

TEST_CASE("a result has the same bits in any company, in any division, on any instruction set") {
  constexpr std::int64_t kColumns = 3072;  // several pieces of columns, and two of rows
  constexpr std::int64_t kOutputs = 87;    // six groups, the last one with seven rows
  WeightMaker maker(7);
  std::mt19937 random(8);
  const std::vector<Row> rows = gaussian_rows(random, 64, kColumns);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    const Matrix matrix(format, kOutputs, kColumns,
                        maker.rows(format, WeightKind::kRandom, kOutputs, kColumns));
    std::vector<Row> all;
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const Activations activations(*set, format, rows);
      if (all.empty()) all = multiply_all(*set, matrix, rows);
      const auto check = [&](const std::vector<Row>& outputs, std::size_t first,
                             std::size_t count) {
        for (std::size_t r = first; r < first + count; ++r) {
          CAPTURE(r);
          REQUIRE(bits_of(outputs[r]) == bits_of(all[r]));
        }
      };
      check(multiply_all(*set, matrix, rows), 0, 64);
      std::vector<Row> outputs = blank_outputs(64, kOutputs);
      for (std::int64_t row = 0; row < 64; ++row) {
        multiply(*set, matrix, activations, row, 1, 0, 6, outputs);
      }
      check(outputs, 0, 64);
      for (std::int64_t count = 2; count <= 17; ++count) {
        CAPTURE(count);
        const std::int64_t first = 17 - count;
        outputs = blank_outputs(64, kOutputs);
        multiply(*set, matrix, activations, first, count, 0, 6, outputs);
        check(outputs, static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      }
      for (const auto& ends : std::vector<std::vector<std::int64_t>>{
               {1, 2, 3, 4, 5, 6}, {3, 6}, {1, 4, 6}, {5, 6}, {2, 2, 6}}) {
        for (const std::int64_t count : {1, 5, 12, 64}) {
          CAPTURE(count);
          outputs = blank_outputs(64, kOutputs);
          std::int64_t begin = 0;
          for (const std::int64_t end : ends) {
            multiply(*set, matrix, activations, 0, count, begin, end, outputs);
            begin = end;
          }
          check(outputs, 0, static_cast<std::size_t>(count));
        }
      }
    }
  }
}

TEST_CASE("threads may compute groups of one product side by side") {
  constexpr std::int64_t kColumns = 512;
  WeightMaker maker(14);
  std::mt19937 random(15);
  const std::vector<Row> rows = gaussian_rows(random, 12, kColumns);
  for (const WeightFormat format : {WeightFormat::kQ4_K, WeightFormat::kQ8_0, WeightFormat::kF16}) {
    CAPTURE(name_of(format));
    const Matrix matrix(format, 90, kColumns,
                        maker.rows(format, WeightKind::kRandom, 90, kColumns));
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const Activations activations(*set, format, rows);
      std::vector<Row> outputs = blank_outputs(12, 90);
      std::vector<std::thread> threads;
      for (std::int64_t group = 0; group < matrix.num_groups(); group += 2) {
        threads.emplace_back(
            [&, group] { multiply(*set, matrix, activations, 0, 12, group, group + 2, outputs); });
      }
      for (std::thread& thread : threads) thread.join();
      const std::vector<Row> expected = multiply_all(*set, matrix, rows);
      for (std::size_t r = 0; r < 12; ++r) CHECK(bits_of(outputs[r]) == bits_of(expected[r]));
    }
  }
}

TEST_CASE("activation blocks are the same on every instruction set") {
  std::mt19937 random(9);
  std::vector<Row> rows = gaussian_rows(random, 3, 1024);
  rows.push_back(gaussian_row(random, 1024, 1e-35F));
  rows.emplace_back(1024, 0.0F);  // halfway between two steps: ties to even
  rows.back()[0] = 127.0F;
  for (std::size_t i = 1; i < 32; ++i) rows.back()[i] = static_cast<float>(i) - 15.5F;
  for (const WeightFormat format : all_formats()) {
    if (is_float(format) || all_kernels().empty()) continue;
    CAPTURE(name_of(format));
    const Activations first(*all_kernels().front(), format, rows);
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const Activations blocks(*set, format, rows);
      for (std::size_t r = 0; r < rows.size(); ++r) {
        for (std::size_t b = 0; b < blocks.blocks()[r].size(); ++b) {
          const auto& mine = blocks.blocks()[r][b];
          const auto& theirs = first.blocks()[r][b];
          REQUIRE(mine.d == theirs.d);
          REQUIRE(std::equal(mine.q, mine.q + kBlockColumns, theirs.q));
          REQUIRE(mine.scaled_sums[0] == theirs.scaled_sums[0]);
        }
      }
    }
  }
}

TEST_CASE("nothing is written outside of the outputs") {
  constexpr std::int64_t kColumns = 256;
  WeightMaker maker(10);
  std::mt19937 random(11);
  const std::vector<Row> rows = gaussian_rows(random, 10, kColumns);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    const auto file = maker.rows(format, WeightKind::kRandom, 33, kColumns);
    for (const std::int64_t num_outputs : {1, 7, 8, 9, 15, 16, 17, 31, 33}) {
      CAPTURE(num_outputs);
      const Matrix matrix(format, num_outputs, kColumns, file);
      for (const KernelSet* set : all_kernels()) {
        const Activations activations(*set, format, rows);
        // For ASan: rows of exactly num_outputs. For the eye: the same amid other values.
        const std::vector<Row> exact = multiply_all(*set, matrix, rows);
        std::vector<Row> padded = blank_outputs(10, num_outputs + 64);
        std::vector<float*> pointers;
        for (Row& row : padded) pointers.push_back(row.data() + 32);
        for (const std::int64_t count : {1, 10}) {
          testing::kernels_of(*set, format)
              .multiply({matrix.packed.data(), kColumns, num_outputs, 0, matrix.num_groups(),
                         activations.pointers(), pointers.data(), count});
        }
        for (std::size_t r = 0; r < 10; ++r) {
          Row expected(static_cast<std::size_t>(num_outputs) + 64, -77.0F);
          std::copy(exact[r].begin(), exact[r].end(), expected.begin() + 32);
          REQUIRE(bits_of(padded[r]) == bits_of(expected));
        }
      }
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
