// Products of our kernels beside ggml's own, on the same inputs: no less exact in any format, in
// any shape that ggml takes, with the same bits on any number of threads.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "ggml_graph.h"

namespace batchcore::kernels {
namespace {

using testing::all_formats;
using testing::bits_of;
using testing::floats_of;
using testing::Graph;
using testing::name_of;
using testing::our_weights;
using testing::Row;
using testing::type_of;
using testing::WeightKind;
using testing::WeightMaker;

using Bytes = std::vector<std::uint8_t>;

// Sums of squares over many results.
struct Errors {
  double ours = 0;
  double stock = 0;
  double rounding = 0;  // what one rounding of each sum of magnitudes would make

  void add(const Row& our_values, const Row& stock_values, const std::vector<double>& expected,
           const std::vector<double>& magnitudes) {
    REQUIRE(our_values.size() == expected.size());
    REQUIRE(stock_values.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ours += std::pow(our_values[i] - expected[i], 2);
      stock += std::pow(stock_values[i] - expected[i], 2);
      rounding += std::pow(magnitudes[i] * 0x1p-24, 2);
    }
  }
};

// `slack` is for chance: with few rows either may be luckier.
void check_no_worse(const Errors& errors, WeightFormat format, double slack) {
  CAPTURE(std::sqrt(errors.ours));
  CAPTURE(std::sqrt(errors.stock));
  CAPTURE(std::sqrt(errors.rounding));
  // Sums of 16 and 256 columns are a little less exact than ggml's 64 lanes, which end in a double.
  const double roundings = format == WeightFormat::kF32 ? 0.5 : 0.1;
  const bool is_no_worse = std::sqrt(errors.ours) <=
                           slack * std::sqrt(errors.stock) + roundings * std::sqrt(errors.rounding);
  CHECK(is_no_worse);
}

struct Expected {
  std::vector<double> values;
  std::vector<double> magnitudes;

  void add(const float* weights, const float* x, std::int64_t columns) {
    double value = 0;
    double magnitude = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      value += double{weights[i]} * double{x[i]};
      magnitude += std::fabs(double{weights[i]} * double{x[i]});
    }
    values.push_back(value);
    magnitudes.push_back(magnitude);
  }
};

// How the activations lie in memory.
enum class Lie { kContiguous, kRowsApart, kSwapped };

struct Product {
  WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
  std::vector<std::int64_t> rows;  // the other dimensions of the activations
  Lie lie;
  Bytes weights;
  Row x;

  [[nodiscard]] std::int64_t num_rows() const { return rows[0] * rows[1] * rows[2]; }

  ggml_tensor* activations(Graph& graph) const {
    ggml_context* context = graph.context();
    if (lie == Lie::kRowsApart) {  // every second row of twice as many
      ggml_tensor* all = graph.floats({columns, 2 * rows[0], rows[1], rows[2]}, x);
      return ggml_view_4d(context, all, columns, rows[0], rows[1], rows[2], 2 * all->nb[1],
                          all->nb[2], all->nb[3], all->nb[1]);
    }
    if (lie == Lie::kSwapped) {
      return ggml_permute(context, graph.floats({columns, rows[1], rows[0], rows[2]}, x), 0, 2, 1,
                          3);
    }
    return graph.floats({columns, rows[0], rows[1], rows[2]}, x);
  }

  Row compute(ggml_backend_buffer_type_t buffer_type, int num_threads) const {
    Graph graph;
    ggml_tensor* w = graph.weights(buffer_type, type_of(format), {columns, num_outputs}, weights);
    return graph.compute({ggml_mul_mat(graph.context(), w, activations(graph))}, num_threads);
  }

  [[nodiscard]] Expected expected() const {
    const Row w = floats_of(type_of(format), weights.data(), columns * num_outputs);
    Graph graph;
    const ggml_tensor* at = activations(graph);
    Expected result;
    for (std::int64_t i = 0; i < num_rows(); ++i) {
      const char* row = static_cast<const char*>(at->data) +
                        static_cast<std::size_t>(i % rows[0]) * at->nb[1] +
                        static_cast<std::size_t>(i / rows[0] % rows[1]) * at->nb[2] +
                        static_cast<std::size_t>(i / rows[0] / rows[1]) * at->nb[3];
      for (std::int64_t o = 0; o < num_outputs; ++o) {
        result.add(w.data() + o * columns, reinterpret_cast<const float*>(row), columns);
      }
    }
    return result;
  }

  // With 1, 2 and 3 threads.
  [[nodiscard]] Row compute_ours() const {
    Row first = compute(our_weights(), 1);
    for (const int num_threads : {2, 3}) {
      REQUIRE(bits_of(compute(our_weights(), num_threads)) == bits_of(first));
    }
    return first;
  }
};

TEST_CASE("products of any shape are no less exact than ggml's, on any number of threads") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(1);
  const auto any = [&random](std::int64_t from, std::int64_t to) {
    return from + static_cast<std::int64_t>(random() % static_cast<unsigned>(to - from + 1));
  };
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    Errors errors;
    for (int i = 0; i < 15; ++i) {
      Product product{.format = format,
                      .columns = 256 * any(1, 9),
                      .num_outputs = any(1, 100),
                      .rows = {any(1, 13), any(1, 3), any(1, 2)},
                      .lie = static_cast<Lie>(i % 3),
                      .weights = {},
                      .x = {}};
      CAPTURE(product.columns);
      CAPTURE(product.num_outputs);
      CAPTURE(i);
      product.weights =
          testing::quantised(random, type_of(format), product.num_outputs, product.columns);
      product.x = testing::gaussian_row(random, 2 * product.num_rows() * product.columns);
      const Expected expected = product.expected();
      errors.add(product.compute_ours(), product.compute(nullptr, 1), expected.values,
                 expected.magnitudes);
    }
    check_no_worse(errors, format, 1.01);
  }
}

TEST_CASE("many rows and many outputs have the same bits on any number of threads") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(2);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    Product product{.format = format,
                    .columns = 1024,
                    .num_outputs = 333,
                    .rows = {150, 1, 1},
                    .lie = Lie::kContiguous,
                    .weights = testing::quantised(random, type_of(format), 333, 1024),
                    .x = testing::gaussian_row(random, 150 * 1024)};
    const Row all = product.compute_ours();
    product.rows = {1, 1, 1};  // and so has the first row alone
    CHECK(bits_of(product.compute_ours()) == bits_of(Row(all.begin(), all.begin() + 333)));
  }
}

TEST_CASE("products of extreme weights and activations are no less exact than ggml's") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(3);
  WeightMaker maker(4);
  constexpr std::int64_t kColumns = 512;
  constexpr std::int64_t kRows = 48;
  Row x = testing::gaussian_row(random, kRows * kColumns);
  for (std::size_t row = 0; row < kRows; row += 6) {
    float* at = x.data() + row * kColumns;  // and one row in three stays as it is
    at[random() % kColumns] = 300.0F;
    std::fill_n(at + kColumns + 128, 64, 0.0F);
    for (std::size_t i = 0; i < kColumns; ++i) {
      at[2 * kColumns + i] = i % 2 == 0 ? 1.5F : -1.5F;
      at[3 * kColumns + i] *= 1e-3F;
    }
  }
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    for (const WeightKind kind : testing::kAllWeightKinds) {
      CAPTURE(static_cast<int>(kind));
      const Product product{.format = format,
                            .columns = kColumns,
                            .num_outputs = 37,
                            .rows = {kRows, 1, 1},
                            .lie = Lie::kContiguous,
                            .weights = maker.rows(format, kind, 37, kColumns),
                            .x = x};
      const Expected expected = product.expected();
      Errors errors;
      errors.add(product.compute_ours(), product.compute(nullptr, 1), expected.values,
                 expected.magnitudes);
      check_no_worse(errors, format, 1.1);
    }
  }
}

// A mixture of experts: `num_used` of eight experts for each token. Activations are one row for
// each of them, or one for each `shared`.
struct Mixture {
  WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
  std::int64_t num_used;
  std::int64_t num_tokens;
  bool shares_rows;
  Bytes weights;
  Row x;
  std::vector<std::int32_t> ids;

  static constexpr std::int64_t kExperts = 8;

  [[nodiscard]] std::int64_t rows_per_token() const { return shares_rows ? 1 : num_used; }

  Row compute(ggml_backend_buffer_type_t buffer_type, int num_threads) const {
    Graph graph;
    ggml_tensor* w =
        graph.weights(buffer_type, type_of(format), {columns, num_outputs, kExperts}, weights);
    ggml_tensor* rows = graph.floats({columns, rows_per_token(), num_tokens}, x);
    // The first of a longer list, as a router gives them.
    ggml_tensor* chosen = ggml_view_2d(graph.context(), graph.integers({kExperts, num_tokens}, ids),
                                       num_used, num_tokens, kExperts * sizeof(std::int32_t), 0);
    return graph.compute({ggml_mul_mat_id(graph.context(), w, rows, chosen)}, num_threads);
  }

  [[nodiscard]] Expected expected() const {
    const Row w = floats_of(type_of(format), weights.data(), columns * num_outputs * kExperts);
    Expected result;
    for (std::int64_t i = 0; i < num_tokens * num_used; ++i) {
      const std::int64_t token = i / num_used;
      const std::int64_t slot = i % num_used;
      const std::int64_t expert = ids[static_cast<std::size_t>(token * kExperts + slot)];
      const std::int64_t row = token * rows_per_token() + slot % rows_per_token();
      for (std::int64_t o = 0; o < num_outputs; ++o) {
        result.add(w.data() + (expert * num_outputs + o) * columns, x.data() + row * columns,
                   columns);
      }
    }
    return result;
  }
};

TEST_CASE("products of chosen experts are no less exact than ggml's, on any number of threads") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(5);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    Errors errors;
    for (std::int64_t num_used = 1; num_used <= Mixture::kExperts; ++num_used) {
      CAPTURE(num_used);
      Mixture mixture{.format = format,
                      .columns = 512,
                      .num_outputs = 16 + 7 * num_used,
                      .num_used = num_used,
                      .num_tokens = 1 + static_cast<std::int64_t>(random() % 9),
                      .shares_rows = num_used % 2 == 1,
                      .weights = {},
                      .x = {},
                      .ids = {}};
      mixture.weights =
          testing::quantised(random, type_of(format), Mixture::kExperts * mixture.num_outputs, 512);
      mixture.x = testing::gaussian_row(random, 512 * mixture.num_tokens * num_used);
      for (std::int64_t token = 0; token < mixture.num_tokens; ++token) {
        std::vector<std::int32_t> order(Mixture::kExperts);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        mixture.ids.insert(mixture.ids.end(), order.begin(), order.end());
      }
      const Row first = mixture.compute(our_weights(), 1);
      for (const int num_threads : {2, 3}) {
        REQUIRE(bits_of(mixture.compute(our_weights(), num_threads)) == bits_of(first));
      }
      const Expected expected = mixture.expected();
      errors.add(first, mixture.compute(nullptr, 1), expected.values, expected.magnitudes);
    }
    check_no_worse(errors, format, 1.01);
  }
}

TEST_CASE("rows of every format are the weights that ggml reads, on any number of threads") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(6);
  for (const WeightFormat format : all_formats()) {
    CAPTURE(name_of(format));
    const Bytes bytes = testing::quantised(random, type_of(format), 50, 768);
    const std::vector<std::int32_t> ids = {0, 49, 16, 15, 17, 31, 32, 48, 3, 3};
    const auto rows = [&](ggml_backend_buffer_type_t buffer_type, int num_threads) {
      Graph graph;
      ggml_tensor* w = graph.weights(buffer_type, type_of(format), {768, 50}, bytes);
      return graph.compute({ggml_get_rows(graph.context(), w, graph.integers({10}, ids))},
                           num_threads);
    };
    const Row expected = rows(nullptr, 1);
    // ggml may have contracted d·q + m, which rounds once less.
    const Row values = rows(our_weights(), 1);
    REQUIRE(values.size() == expected.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const bool is_close = std::fabs(values[i] - expected[i]) <= 1e-7F;
      REQUIRE(is_close);
    }
    for (const int num_threads : {2, 3}) {
      CHECK(bits_of(rows(our_weights(), num_threads)) == bits_of(values));
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
