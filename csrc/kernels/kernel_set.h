// What each instruction set offers: one table of functions. The code behind it is compiled once for
// each set (simd/), and cpu_select.h says which table this CPU can run.
#pragma once

#include <cstdint>

#include "kernels/attention_task.h"
#include "kernels/packed_layout.h"

namespace batchcore::kernels {

/// Part of a matrix product: all activation rows times the weights of some groups.
struct ProductTask {
  const std::uint8_t* weights;  ///< packed, the first group of the matrix
  std::int64_t columns;         ///< of the weights, = length of an activation row
  std::int64_t num_outputs;     ///< rows of the weights; the last group may be partly empty
  std::int64_t begin_group;     ///< groups to compute: [begin_group, end_group)
  std::int64_t end_group;
  /// For each activation row: ActivationBlocks, or floats where the weights are floating-point.
  const void* const* activations;
  float* const* outputs;  ///< for each activation row: where its num_outputs floats begin
  std::int64_t num_rows;
};

/// Activation functions of gated units, times the gate.
enum class Gate : std::uint8_t {
  kSilu,  ///< x / (1 + e^−x)
  kGelu,  ///< by tanh: x / 2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))
};

struct FormatKernels {
  /// Computes a task. Each output is one chain of float operations in the order of columns, the
  /// same however many rows and groups a task has, and on every instruction set.
  void (*multiply)(const ProductTask& task);
  /// Turns `columns` floats into ActivationBlocks; null where multiply takes floats.
  void (*quantize)(const float* row, std::int64_t columns, ActivationBlock* blocks);
};

struct KernelSet {
  const char* name;
  FormatKernels formats[kNumFormats];
  void (*scan_mask)(const MaskScan& scan);
  void (*attend)(const AttentionTask& task, float* scratch);
  void (*merge)(const MergeTask& task);
  /// outputs[i] = f(x[i]) · gates[i]
  void (*gate)(Gate function, const float* x, const float* gates, std::int64_t count,
               float* outputs);
};

}  // namespace batchcore::kernels
