// Matrix products of every instruction set that this CPU executes: how exact they are.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernel_data.h"
#include "kernels/kernel_set.h"

namespace batchcore::kernels {
namespace {

using testing::all_formats;
using testing::all_kernels;
using testing::bits_of;
using testing::gaussian_row;
using testing::gaussian_rows;
using testing::is_float;
using testing::Matrix;
using testing::multiply_all;
using testing::name_of;
using testing::Row;
using testing::WeightKind;
using testing::WeightMaker;

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

struct Expected {
  double value = 0;
  double rounding = 0;    // what float sums may be off by
  double quantising = 0;  // what activations of 8 bits may be off by
};

Expected expect(const Row& weights, const Row& x) {
  Expected expected;
  double magnitude = 0;
  double largest_weight = 0;
  for (const float w : weights) largest_weight = std::max(largest_weight, std::fabs(double{w}));
  for (std::size_t block = 0; block < x.size(); block += kBlockColumns) {
    double largest = 0;
    double sum = 0;
    for (std::size_t i = block; i < block + kBlockColumns; ++i) {
      expected.value += double{weights[i]} * double{x[i]};
      magnitude += std::fabs(double{x[i]});
      largest = std::max(largest, std::fabs(double{x[i]}));
      sum += std::fabs(double{weights[i]});
    }
    // Half a step of 1/127 of the largest; below 1e-35 a block counts as zero.
    expected.quantising += sum * (largest < 1e-35 ? largest : 0.5001 * largest / 127);
  }
  // A block adds two terms, d·Σq and m·Σ; together they may be twice as large as the weights.
  const double steps = 2.0 * static_cast<double>(x.size() / kBlockColumns) + 4;
  expected.rounding = steps * kEpsilon * 3 * largest_weight * magnitude + 1e-42;
  return expected;
}

// Float weights are multiplied and added one by one.
double allowed(WeightFormat format, const Expected& expected, std::size_t columns) {
  if (!is_float(format)) return expected.rounding + expected.quantising;
  return expected.rounding / 3 * static_cast<double>(columns) / 4;
}

void check_all(const KernelSet& set, const Matrix& matrix, const std::vector<Row>& rows,
               bool is_exact = false) {
  CAPTURE(name_of(matrix.format));
  CAPTURE(name_of(set));
  const std::vector<Row> outputs = multiply_all(set, matrix, rows);
  for (std::int64_t o = 0; o < matrix.num_outputs; ++o) {
    const Row weights = matrix.row(o);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const Expected expected = expect(weights, rows[r]);
      const double limit =
          is_exact ? expected.rounding : allowed(matrix.format, expected, rows[r].size());
      const double error =
          std::fabs(double{outputs[r][static_cast<std::size_t>(o)]} - expected.value);
      CAPTURE(r);
      CAPTURE(o);
      REQUIRE(error <= limit);
    }
  }
}

#if defined(__x86_64__) && defined(__linux__)
TEST_CASE("a CPU with AVX2 has kernels, the fastest first") {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
  REQUIRE(!all_kernels().empty());
  CHECK(std::string(all_kernels().back()->name) == "avx2");
  if (__builtin_cpu_supports("avx512vnni")) {
    CHECK(std::string(all_kernels().front()->name) == "avx512_vnni");
  }
}
#endif

TEST_CASE("products are as exact as 8 bits allow, for every extreme of weights and activations") {
  constexpr std::int64_t kColumns = 512;
  WeightMaker maker(1);
  std::mt19937 random(2);
  std::vector<Row> rows = {gaussian_row(random, kColumns),
                           gaussian_row(random, kColumns, 1e-30F),
                           gaussian_row(random, kColumns, 1e-36F),
                           gaussian_row(random, kColumns, 1e28F),
                           Row(kColumns, 3.0F),
                           Row(kColumns, 0.0F)};
  rows.emplace_back(kColumns);  // alternating signs, all of the largest magnitude
  for (std::size_t i = 0; i < kColumns; ++i) rows.back()[i] = i % 2 == 0 ? -2.0F : 2.0F;
  rows.push_back(gaussian_row(random, kColumns));  // an outlier
  rows.back()[77] = 1000.0F;
  rows.push_back(gaussian_row(random, kColumns));  // a block of zeros
  std::fill_n(rows.back().begin() + 64, 32, 0.0F);
  for (const WeightFormat format : all_formats()) {
    for (const WeightKind kind : testing::kAllWeightKinds) {
      CAPTURE(static_cast<int>(kind));
      const Matrix matrix(format, 41, kColumns, maker.rows(format, kind, 41, kColumns));
      for (const KernelSet* set : all_kernels()) check_all(*set, matrix, rows);
    }
  }
}

TEST_CASE("activations that 8 bits hold lose nothing") {
  constexpr std::int64_t kColumns = 1024;
  WeightMaker maker(3);
  std::mt19937 random(4);
  std::vector<Row> rows(7, Row(kColumns));
  for (Row& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      row[i] = static_cast<float>(static_cast<int>(random() % 255) - 127);
      if (i % kBlockColumns == random() % 3) row[i] = random() % 2 == 0 ? 127.0F : -127.0F;
    }
    for (std::size_t i = 5; i < row.size(); i += kBlockColumns) row[i] = -127.0F;
  }
  for (const WeightFormat format : all_formats()) {
    if (is_float(format)) continue;
    for (const WeightKind kind : testing::kAllWeightKinds) {
      const Matrix matrix(format, 24, kColumns, maker.rows(format, kind, 24, kColumns));
      for (const KernelSet* set : all_kernels()) check_all(*set, matrix, rows, true);
    }
  }
}

TEST_CASE("random products are off by far less than the worst case") {
  constexpr std::int64_t kColumns = 2048;
  WeightMaker maker(5);
  std::mt19937 random(6);
  const std::vector<Row> rows = gaussian_rows(random, 4, kColumns);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    const Matrix matrix(format, 64, kColumns,
                        maker.rows(format, WeightKind::kRandom, 64, kColumns));
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const std::vector<Row> outputs = multiply_all(*set, matrix, rows);
      double errors = 0;
      double squares = 0;  // of what is summed: Σ (w·x)²
      for (std::int64_t o = 0; o < matrix.num_outputs; ++o) {
        const Row weights = matrix.row(o);
        for (std::size_t r = 0; r < rows.size(); ++r) {
          double value = 0;
          for (std::size_t i = 0; i < weights.size(); ++i) {
            const double term = double{weights[i]} * double{rows[r][i]};
            value += term;
            squares += term * term;
          }
          const double error = double{outputs[r][static_cast<std::size_t>(o)]} - value;
          errors += error * error;
        }
      }
      // A step is a 127th of the largest of 32, which is about 2.1 standard deviations: an error
      // of 2.1 / 127 / √12 for each activation.
      CHECK(std::sqrt(errors / squares) < (is_float(format) ? 2e-6 : 0.006));
    }
  }
}

TEST_CASE("a row with a NaN or an infinity has no finite result, and the others are as before") {
  constexpr std::int64_t kColumns = 1536;
  WeightMaker maker(12);
  std::mt19937 random(13);
  const std::vector<Row> sane = gaussian_rows(random, 9, kColumns);
  std::vector<Row> rows = sane;
  rows[3][700] = std::numeric_limits<float>::quiet_NaN();
  rows[5][0] = -std::numeric_limits<float>::infinity();
  rows[6][1535] = std::numeric_limits<float>::infinity();
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    const Matrix matrix(format, 40, kColumns,
                        maker.rows(format, WeightKind::kRandom, 40, kColumns));
    for (const KernelSet* set : all_kernels()) {
      CAPTURE(name_of(*set));
      const std::vector<Row> expected = multiply_all(*set, matrix, sane);
      const std::vector<Row> outputs = multiply_all(*set, matrix, rows);
      for (const std::size_t r : {0, 1, 2, 3, 4, 5, 6, 7, 8}) {
        CAPTURE(r);
        if (r == 3 || r == 5 || r == 6) {
          CHECK(std::none_of(outputs[r].begin(), outputs[r].end(),
                             [](float y) { return std::isfinite(y); }));
        } else {
          CHECK(bits_of(outputs[r]) == bits_of(expected[r]));
        }
      }
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
