// A product ready to be computed: packed random weights and quantised activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/kernel_set.h"
#include "kernels/packing.h"

namespace batchcore::bench {

constexpr const char* kFormatNames[kernels::kNumFormats] = {
    "Q4_0", "Q4_1", "Q5_0",   "Q5_1",   "Q8_0", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16",  "BF16", "F32"};

/// Memory for weights as a loaded model has it: in huge pages, where the system gives them.
class WeightMemory {
 public:
  explicit WeightMemory(std::size_t size) : size_((size + kHugePage - 1) / kHugePage * kHugePage) {
    data_ = static_cast<std::uint8_t*>(std::aligned_alloc(kHugePage, size_));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, size_, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0x11, size_);
  }
  ~WeightMemory() { std::free(data_); }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;

  [[nodiscard]] const std::uint8_t* data() const { return data_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  std::size_t size_;
  std::uint8_t* data_;
};

struct ProductScene {
  kernels::WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
  std::size_t num_weight_bytes = 0;
  std::shared_ptr<const WeightMemory> weights;
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
    num_weight_bytes =
        static_cast<std::size_t>(num_groups) * kernels::layout_of(format).group_bytes(columns);
    weights = std::make_shared<WeightMemory>(num_weight_bytes);
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
        {.weights = weights->data(),
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
