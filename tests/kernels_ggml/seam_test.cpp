// What the seam relies on inside ggml. If these fail after a new llama.cpp came in, read
// ggml_seam.cpp beside ggml-cpu.cpp and traits.h: an interface between them has changed.
#include "kernels/seam.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "ggml_graph.h"

namespace batchcore::kernels {
namespace {

using testing::bits_of;
using testing::Graph;
using testing::our_weights;
using testing::Row;

constexpr std::int64_t kColumns = 256;
constexpr std::int64_t kOutputs = 40;

struct Inputs {
  std::vector<std::uint8_t> weights;
  std::vector<Row> rows;
  Row joined;

  Inputs() {
    std::mt19937 random(1);
    weights = testing::quantised(random, GGML_TYPE_Q5_0, kOutputs, kColumns);
    rows = testing::gaussian_rows(random, 3, kColumns);
    for (const Row& row : rows) joined.insert(joined.end(), row.begin(), row.end());
  }
};

// What our kernels make of the inputs when they are called without ggml.
Row called_directly(const Inputs& inputs) {
  const testing::Matrix matrix(WeightFormat::kQ5_0, kOutputs, kColumns, inputs.weights);
  Row values;
  for (const Row& row : testing::multiply_all(*best_kernels(), matrix, inputs.rows)) {
    values.insert(values.end(), row.begin(), row.end());
  }
  return values;
}

TEST_CASE("our buffer type comes first, both for ggml and for who loads a model") {
  if (our_weights() == nullptr) return;
  install();  // once is enough
  const auto& types = ggml_backend_cpu_get_extra_buffer_types();
  REQUIRE(!types.empty());
  CHECK(std::string(ggml_backend_buft_name(types.front())) == "CPU_BATCHCORE");
  CHECK(std::count(types.begin(), types.end(), types.front()) == 1);

  ggml_backend_reg_t registry = ggml_backend_cpu_reg();
  auto* get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
  const bool is_known = get != nullptr;
  REQUIRE(is_known);
  ggml_backend_buffer_type_t* of_device = get(ggml_backend_reg_dev_get(registry, 0));
  REQUIRE(of_device != nullptr);
  CHECK(of_device[0] == types.front());
  CHECK(ggml_backend_buft_get_device(types.front()) == ggml_backend_reg_dev_get(registry, 0));
}

TEST_CASE("MUL_MAT over weights in our buffer is computed by our kernels") {
  if (our_weights() == nullptr) return;
  const Inputs inputs;
  Graph ours;
  ggml_tensor* product = ggml_mul_mat(
      ours.context(),
      ours.weights(our_weights(), GGML_TYPE_Q5_0, {kColumns, kOutputs}, inputs.weights),
      ours.floats({kColumns, 3}, inputs.joined));
  const Row values = ours.compute({product});
  CHECK(bits_of(values) == bits_of(called_directly(inputs)));

  Graph stock;
  product = ggml_mul_mat(
      stock.context(), stock.weights(nullptr, GGML_TYPE_Q5_0, {kColumns, kOutputs}, inputs.weights),
      stock.floats({kColumns, 3}, inputs.joined));
  CHECK(bits_of(stock.compute({product})) != bits_of(values));
}

TEST_CASE("MUL_MAT_ID over weights in our buffer is computed by our kernels") {
  if (our_weights() == nullptr) return;
  const Inputs inputs;  // one expert of two, the other one is zeros
  std::vector<std::uint8_t> experts(2 * inputs.weights.size());
  std::copy(inputs.weights.begin(), inputs.weights.end(),
            experts.begin() + static_cast<long>(inputs.weights.size()));
  Graph graph;
  ggml_tensor* product = ggml_mul_mat_id(
      graph.context(),
      graph.weights(our_weights(), GGML_TYPE_Q5_0, {kColumns, kOutputs, 2}, experts),
      graph.floats({kColumns, 1, 3}, inputs.joined), graph.integers({1, 3}, {1, 1, 1}));
  CHECK(bits_of(graph.compute({product})) == bits_of(called_directly(inputs)));
}

TEST_CASE("GET_ROWS from weights in our buffer is computed by our kernels") {
  if (our_weights() == nullptr) return;
  const Inputs inputs;
  Graph graph;
  ggml_tensor* rows = ggml_get_rows(
      graph.context(),
      graph.weights(our_weights(), GGML_TYPE_Q5_0, {kColumns, kOutputs}, inputs.weights),
      graph.integers({4}, {39, 0, 17, 39}));
  const Row values = graph.compute({rows}, 3);
  const Row all = testing::floats_of(GGML_TYPE_Q5_0, inputs.weights.data(), kColumns * kOutputs);
  Row expected;
  for (const int row : {39, 0, 17, 39}) {
    expected.insert(expected.end(), all.begin() + row * kColumns,
                    all.begin() + (row + 1) * kColumns);
  }
  CHECK(values == expected);
}

// As llama.cpp's loader asks: with the weight in an empty buffer of the type.
bool is_offered(WeightFormat format) {
  Graph graph;
  ggml_context* context =
      ggml_init({.mem_size = 16 * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true});
  ggml_tensor* weights = ggml_new_tensor_2d(context, testing::type_of(format), kColumns, kOutputs);
  ggml_tensor* x = ggml_new_tensor_2d(context, GGML_TYPE_F32, kColumns, 512);
  ggml_tensor* product = ggml_mul_mat(context, weights, x);
  weights->buffer = ggml_backend_buft_alloc_buffer(our_weights(), 0);
  const bool is_supported =
      ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), product);
  ggml_backend_buffer_free(weights->buffer);
  ggml_free(context);
  return is_supported;
}

TEST_CASE("our buffer takes weights while a load asks for it, and then only") {
  if (our_weights() == nullptr) return;
  for (const WeightFormat format : testing::all_formats()) {
    CAPTURE(testing::name_of(format));
    CHECK_FALSE(is_offered(format));
    {
      const LoadScope load(true, 1, 0);
      CHECK(is_offered(format));
    }
    {
      const LoadScope load(false, 1, 0);
      CHECK_FALSE(is_offered(format));
    }
  }
}

TEST_CASE("a load learns that there was no memory for repacked weights") {
  if (our_weights() == nullptr) return;
  const LoadScope load(true, 1, 1000);
  CHECK_FALSE(load.ran_out_of_memory());
  CHECK(ggml_backend_buft_alloc_buffer(our_weights(), 1001) == nullptr);
  CHECK(load.ran_out_of_memory());
}

TEST_CASE("weights are packed alike by one thread and by several") {
  if (our_weights() == nullptr) return;
  std::mt19937 random(2);
  const auto bytes = testing::quantised(random, GGML_TYPE_Q4_K, 3 * 700, kColumns);
  const auto packed = [&](int num_threads) {
    const LoadScope load(true, num_threads, 0);
    Graph graph;
    const ggml_tensor* weights =
        graph.weights(our_weights(), GGML_TYPE_Q4_K, {kColumns, 700, 3}, bytes);
    const auto* data = static_cast<const std::uint8_t*>(weights->data);
    return std::vector<std::uint8_t>(
        data, data + ggml_backend_buft_get_alloc_size(our_weights(), weights));
  };
  const auto alone = packed(1);
  CHECK(packed(2) == alone);
  CHECK(packed(3) == alone);
}

TEST_CASE("operations whose results depend on the call are named, ours are not") {
  if (our_weights() == nullptr) return;
  const Inputs inputs;
  for (const bool is_ours : {true, false}) {
    std::uint32_t operations = 0;
    Graph graph;
    ggml_tensor* weights = graph.weights(is_ours ? our_weights() : nullptr, GGML_TYPE_Q5_0,
                                         {kColumns, kOutputs}, inputs.weights);
    ggml_tensor* product =
        ggml_mul_mat(graph.context(), weights, graph.floats({kColumns, 3}, inputs.joined));
    {
      const VariantWatch watch(operations);
      graph.compute({product});
      graph.compute({product});
    }
    graph.compute({product});
    CHECK(operations == (is_ours ? 0U : std::uint32_t{kMatrixProduct}));
  }
}

// Of two rows, with the halves swapped or not, on 3 threads.
Row gated(ggml_backend_buffer_type_t buffer_type, const Inputs& inputs, bool is_split,
          ggml_glu_op function, bool is_swapped) {
  Graph graph;
  ggml_context* context = graph.context();
  ggml_tensor* weights =
      graph.weights(buffer_type, GGML_TYPE_Q5_0, {kColumns, kOutputs}, inputs.weights);
  ggml_tensor* x = ggml_mul_mat(context, weights, graph.floats({kColumns, 3}, inputs.joined));
  if (!is_split) return graph.compute({x, ggml_glu(context, x, function, is_swapped)}, 3);
  ggml_tensor* gates = ggml_scale(context, x, 0.5F);
  return graph.compute({x, ggml_glu_split(context, x, gates, function)}, 3);
}

double activation(ggml_glu_op function, double x) {
  if (function == GGML_GLU_OP_SWIGLU) return x / (1 + std::exp(-x));
  return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (x + 0.044715 * x * x * x)));
}

TEST_CASE("gated units behind a product of ours are ours, in every form") {
  if (our_weights() == nullptr) return;
  Inputs inputs;
  for (float& x : inputs.joined) x *= 2.0F;
  for (const ggml_glu_op function : {GGML_GLU_OP_SWIGLU, GGML_GLU_OP_GEGLU}) {
    for (const int form : {0, 1, 2}) {
      CAPTURE(form);
      CAPTURE(static_cast<int>(function));
      const bool is_split = form == 2;
      const bool is_swapped = form == 1;
      const Row values = gated(our_weights(), inputs, is_split, function, is_swapped);
      constexpr std::size_t kWidth = kOutputs;
      const std::size_t width = is_split ? kWidth : kWidth / 2;
      REQUIRE(values.size() == 3 * (kWidth + width));
      Row direct(width);
      for (std::size_t row = 0; row < 3; ++row) {
        const float* of_row = values.data() + row * kWidth;
        Row gates(of_row, of_row + kWidth);
        const float* x = of_row + (is_swapped ? width : 0);
        if (is_split) {
          for (float& gate : gates) gate *= 0.5F;
        } else if (!is_swapped) {
          gates.assign(of_row + width, of_row + 2 * width);
        }
        const Gate gate = function == GGML_GLU_OP_SWIGLU ? Gate::kSilu : Gate::kGelu;
        best_kernels()->gate(gate, x, gates.data(), static_cast<std::int64_t>(width),
                             direct.data());
        const float* result = values.data() + 3 * kWidth + row * width;
        CHECK(bits_of(Row(result, result + width)) == bits_of(direct));
        for (std::size_t i = 0; i < width; ++i) {
          CHECK(std::fabs(result[i] - activation(function, x[i]) * gates[i]) < 1e-5);
        }
      }
    }
  }
}

}  // namespace
}  // namespace batchcore::kernels
