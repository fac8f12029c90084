// A product ready to be computed: packed random weights and quantised activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/kernel_set.h"
#include "kernels/packing.h"

namespace batchcore::bench {

constexpr const char* kFormatNames[kernels::kNumFormats] = {
    "Q4_0", "Q4_1", "Q5_0",   "Q5_1",   "Q8_0", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16",  "BF16", "F32"};

struct ProductScene {
  kernels::WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
  std::vector<std::uint8_t> weights;
  std::vector<float> activations;
  std::vector<kernels::ActivationBlock> blocks;
  std::vector<const void*> rows;
  std::vector<float> results;
  std::vector<float*> outputs;

  // Weights are the same few bytes over and over, which costs kernels what any weights cost.
  ProductScene(kernels::WeightFormat of, std::int64_t num_columns, std::int64_t num_rows_of_weights,
               std::int64_t num_rows)
      : format(of), columns(num_columns), num_outputs(num_rows_of_weights) {
    const std::int64_t num_groups = num_outputs / kernels::kGroupRows;
    weights.resize(static_cast<std::size_t>(num_groups) *
                   kernels::layout_of(format).group_bytes(columns));
    std::memset(weights.data(), 0x11, weights.size());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    activations.resize(static_cast<std::size_t>(num_rows * columns));
    for (float& x : activations) x = normal(random);
    blocks.resize(activations.size() / kernels::kBlockColumns);
    results.resize(static_cast<std::size_t>(num_rows * num_outputs));
    for (std::int64_t row = 0; row < num_rows; ++row) {
      outputs.push_back(results.data() + row * num_outputs);
      rows.push_back(nullptr);
    }
  }

  void quantize(const kernels::KernelSet& set) {
    const auto& of_format = set.formats[static_cast<int>(format)];
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const float* x = activations.data() + row * static_cast<std::size_t>(columns);
      rows[row] = x;
      if (of_format.quantize == nullptr) continue;
      auto* to = blocks.data() + row * static_cast<std::size_t>(columns / kernels::kBlockColumns);
      of_format.quantize(x, columns, to);
      rows[row] = to;
    }
  }

  void multiply(const kernels::KernelSet& set, std::int64_t begin_group, std::int64_t end_group) {
    set.formats[static_cast<int>(format)].multiply(
        {.weights = weights.data(),
         .columns = columns,
         .num_outputs = num_outputs,
         .begin_group = begin_group,
         .end_group = end_group,
         .activations = rows.data(),
         .outputs = outputs.data(),
         .num_rows = static_cast<std::int64_t>(rows.size())});
  }
};

}  // namespace batchcore::bench
