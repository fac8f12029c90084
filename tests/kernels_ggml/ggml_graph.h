// Graphs of one or two operations for the tests of the kernels inside ggml.
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend-impl.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <traits.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernel_data.h"
#include "kernels/cpu_select.h"
#include "kernels/seam.h"

namespace batchcore::kernels::testing {

inline constexpr ggml_type kGgmlTypes[kNumFormats] = {
    GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
    GGML_TYPE_Q2_K,   GGML_TYPE_Q3_K,   GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
    GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS, GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_F32};

inline ggml_type type_of(WeightFormat format) { return kGgmlTypes[static_cast<int>(format)]; }

/// The buffer type of our weights; null where this CPU has no kernels of ours.
inline ggml_backend_buffer_type_t our_weights() {
  if (!is_available()) return nullptr;
  install();
  return ggml_backend_cpu_get_extra_buffer_types().front();
}

/// Rows of `type` as floats, by ggml's own reading.
inline std::vector<float> floats_of(ggml_type type, const void* rows, std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  if (type == GGML_TYPE_F32) {
    std::memcpy(values.data(), rows, sizeof(float) * values.size());
  } else {
    ggml_get_type_traits(type)->to_float(rows, values.data(), count);
  }
  return values;
}

/// Normally distributed weights, quantised by ggml.
inline std::vector<std::uint8_t> quantised(std::mt19937& random, ggml_type type,
                                           std::int64_t num_rows, std::int64_t columns,
                                           float size = 0.1F) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const Row row = gaussian_row(random, columns, size);
    values.insert(values.end(), row.begin(), row.end());
  }
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(num_rows) *
                                  ggml_row_size(type, columns));
  ggml_quantize_chunk(type, values.data(), bytes.data(), 0, num_rows, columns, nullptr);
  return bytes;
}

/// Owns tensors and computes graphs of them.
class Graph {
 public:
  Graph() {
    constexpr std::size_t kBytes = std::size_t{64} << 20;
    context_ = ggml_init({.mem_size = kBytes, .mem_buffer = nullptr, .no_alloc = false});
    weights_context_ = ggml_init(
        {.mem_size = 16 * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true});
  }
  ~Graph() {
    for (ggml_backend_buffer_t buffer : buffers_) ggml_backend_buffer_free(buffer);
    ggml_free(weights_context_);
    ggml_free(context_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  [[nodiscard]] ggml_context* context() { return context_; }

  /// Weights in a buffer of `buffer_type`, or of ggml's where that is null.
  ggml_tensor* weights(ggml_backend_buffer_type_t buffer_type, ggml_type type,
                       std::vector<std::int64_t> shape, const std::vector<std::uint8_t>& bytes) {
    if (buffer_type == nullptr) buffer_type = ggml_backend_cpu_buffer_type();
    ggml_tensor* tensor =
        ggml_new_tensor(weights_context_, type, static_cast<int>(shape.size()), shape.data());
    const std::size_t size = ggml_backend_buft_get_alloc_size(buffer_type, tensor);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buffer_type, size);
    buffers_.push_back(buffer);
    ggml_backend_tensor_alloc(buffer, tensor, ggml_backend_buffer_get_base(buffer));
    ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
    return tensor;
  }

  ggml_tensor* floats(std::vector<std::int64_t> shape, const std::vector<float>& values) {
    ggml_tensor* tensor =
        ggml_new_tensor(context_, GGML_TYPE_F32, static_cast<int>(shape.size()), shape.data());
    std::memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
    return tensor;
  }

  ggml_tensor* integers(std::vector<std::int64_t> shape, const std::vector<std::int32_t>& values) {
    ggml_tensor* tensor =
        ggml_new_tensor(context_, GGML_TYPE_I32, static_cast<int>(shape.size()), shape.data());
    std::memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
    return tensor;
  }

  /// What `outputs` are, one after the other.
  Row compute(const std::vector<ggml_tensor*>& outputs, int num_threads = 1) {
    ggml_cgraph* graph = ggml_new_graph(context_);
    for (ggml_tensor* output : outputs) {
      ggml_build_forward_expand(graph, output);
      std::memset(output->data, 0xff, ggml_nbytes(output));  // NaNs
    }
    ggml_cplan plan = ggml_graph_plan(graph, num_threads, nullptr);
    std::vector<std::uint8_t> work(plan.work_size + 64, 0xff);
    plan.work_data = work.data();
    const ggml_status status = ggml_graph_compute(graph, &plan);
    Row values;
    if (status != GGML_STATUS_SUCCESS) return values;
    for (const ggml_tensor* output : outputs) {
      const auto* data = static_cast<const float*>(output->data);
      values.insert(values.end(), data, data + ggml_nelements(output));
    }
    return values;
  }

 private:
  ggml_context* context_;
  ggml_context* weights_context_;
  std::vector<ggml_backend_buffer_t> buffers_;
};

}  // namespace batchcore::kernels::testing
