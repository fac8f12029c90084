// The only file that knows ggml's internals. What it relies on: ggml_backend_cpu_get_extra_buffer_
// types() returns its vector by reference; ggml_cpu_extra_compute_forward() and _work_size() ask
// each of them for every node; a thread team has ggml_barrier() and one counter of chunks. Tests of
// the seam fail where a new llama.cpp changes that.

#include <ggml-backend-impl.h>
#include <ggml-cpu-impl.h>
#include <ggml-cpu.h>
#include <traits.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/attention_plan.h"
#include "kernels/cpu_select.h"
#include "kernels/packing.h"
#include "kernels/seam.h"

namespace batchcore::kernels {

struct CacheScope::Cache {
  std::vector<const void*> layers;
  std::unique_ptr<CellPositions> positions;
  AttentionPlan plan;
  std::vector<float> partials;
  std::int32_t spans_per_tile = 0;  // of the operation in work; 0 = a task does all of its spans
};

// KV caches by the tensors of their layers.
class Registry {
 public:
  static Registry& instance() {
    static Registry registry;
    return registry;
  }

  void add(CacheScope::Cache& cache) {
    const std::unique_lock lock(mutex_);
    for (const void* layer : cache.layers) caches_[layer] = &cache;
  }

  void remove(const CacheScope::Cache& cache) {
    const std::unique_lock lock(mutex_);
    for (const void* layer : cache.layers) caches_.erase(layer);
  }

  CacheScope::Cache* find(const void* layer) {
    const std::shared_lock lock(mutex_);
    const auto found = caches_.find(layer);
    return found == caches_.end() ? nullptr : found->second;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<const void*, CacheScope::Cache*> caches_;
};

namespace {

struct LoadState {
  bool enabled = false;
  int num_threads = 1;
  std::uint64_t available_bytes = 0;
  bool lock_memory = false;
  bool ran_out = false;
};
thread_local LoadState load_state;
thread_local std::uint32_t* variant_operations = nullptr;

const ggml_tensor* root_of(const ggml_tensor* tensor) {
  return tensor->view_src != nullptr ? tensor->view_src : tensor;
}

// The view of a KV cache that K is, or was cast from: llama.cpp casts single precision to half.
const ggml_tensor* cache_view(const ggml_tensor* k) { return k->op == GGML_OP_CPY ? k->src[0] : k; }

std::size_t round_up(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

// ---- Weights

bool find_format(ggml_type type, WeightFormat& format) {
  switch (type) {
    case GGML_TYPE_Q4_0:
      format = WeightFormat::kQ4_0;
      return true;
    case GGML_TYPE_Q4_1:
      format = WeightFormat::kQ4_1;
      return true;
    case GGML_TYPE_Q5_0:
      format = WeightFormat::kQ5_0;
      return true;
    case GGML_TYPE_Q5_1:
      format = WeightFormat::kQ5_1;
      return true;
    case GGML_TYPE_Q8_0:
      format = WeightFormat::kQ8_0;
      return true;
    case GGML_TYPE_Q2_K:
      format = WeightFormat::kQ2_K;
      return true;
    case GGML_TYPE_Q3_K:
      format = WeightFormat::kQ3_K;
      return true;
    case GGML_TYPE_Q4_K:
      format = WeightFormat::kQ4_K;
      return true;
    case GGML_TYPE_Q5_K:
      format = WeightFormat::kQ5_K;
      return true;
    case GGML_TYPE_Q6_K:
      format = WeightFormat::kQ6_K;
      return true;
    case GGML_TYPE_IQ4_NL:
      format = WeightFormat::kIQ4_NL;
      return true;
    case GGML_TYPE_IQ4_XS:
      format = WeightFormat::kIQ4_XS;
      return true;
    case GGML_TYPE_F16:
      format = WeightFormat::kF16;
      return true;
    case GGML_TYPE_BF16:
      format = WeightFormat::kBF16;
      return true;
    case GGML_TYPE_F32:
      format = WeightFormat::kF32;
      return true;
    default:
      return false;
  }
}

// Matrices of one tensor (experts) follow one another.
struct PackedTensor {
  WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
  std::int64_t num_groups;
  std::size_t matrix_bytes;

  explicit PackedTensor(const ggml_tensor& tensor) {
    GGML_ASSERT(find_format(tensor.type, format));
    columns = tensor.ne[0];
    num_outputs = tensor.ne[1];
    num_groups = (num_outputs + kGroupRows - 1) / kGroupRows;
    matrix_bytes = static_cast<std::size_t>(num_groups) * layout_of(format).group_bytes(columns);
  }
};

void pack_tensor(const ggml_tensor& tensor, const std::uint8_t* source) {
  const PackedTensor packed(tensor);
  const std::int64_t num_matrices = tensor.ne[2] * tensor.ne[3];
  const std::size_t row_bytes = file_row_bytes(packed.format, packed.columns);
  const std::size_t group_bytes = layout_of(packed.format).group_bytes(packed.columns);
  std::atomic<std::int64_t> next{0};
  constexpr std::int64_t kGroupsAtATime = 16;
  const std::int64_t num_groups = num_matrices * packed.num_groups;
  const auto work = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(kGroupsAtATime, std::memory_order_relaxed);
      if (begin >= num_groups) return;
      for (std::int64_t i = begin; i < std::min(begin + kGroupsAtATime, num_groups); ++i) {
        const std::int64_t first_row = i % packed.num_groups * kGroupRows;
        const std::int64_t row = i / packed.num_groups * packed.num_outputs + first_row;
        pack_group(
            packed.format, source + static_cast<std::size_t>(row) * row_bytes,
            std::min<std::int64_t>(kGroupRows, packed.num_outputs - first_row), packed.columns,
            static_cast<std::uint8_t*>(tensor.data) + static_cast<std::size_t>(i) * group_bytes);
      }
    }
  };
  std::vector<std::thread> helpers;
  const std::int64_t useful = num_groups / kGroupsAtATime;
  try {
    for (int i = 1; i < std::min<std::int64_t>(load_state.num_threads, useful); ++i) {
      helpers.emplace_back(work);
    }
  } catch (const std::exception&) {  // fewer threads do the same work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

struct WeightBuffer {
  void* data;
  std::size_t size;
};

void free_weights(ggml_backend_buffer_t buffer) {
  auto* weights = static_cast<WeightBuffer*>(buffer->context);
#if defined(__linux__)
  munmap(weights->data, weights->size);
#else
  std::free(weights->data);
#endif
  delete weights;
}

void* base_of_weights(ggml_backend_buffer_t buffer) {
  return static_cast<WeightBuffer*>(buffer->context)->data;
}

void set_weights(ggml_backend_buffer_t, ggml_tensor* tensor, const void* data, std::size_t offset,
                 std::size_t size) {
  GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor) && "weights are packed as a whole");
  pack_tensor(*tensor, static_cast<const std::uint8_t*>(data));
}

void clear_weights(ggml_backend_buffer_t buffer, std::uint8_t value) {
  const auto* weights = static_cast<WeightBuffer*>(buffer->context);
  std::memset(weights->data, value, weights->size);
}

const char* name_of_type(ggml_backend_buffer_type_t) { return "CPU_BATCHCORE"; }

ggml_backend_buffer_t allocate_weights(ggml_backend_buffer_type_t type, std::size_t size) {
  // One page more than needed: llama.cpp asks for empty buffers when it looks for one that fits.
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  const std::size_t bytes = round_up(size + 1, size < kHugePage ? 4096 : kHugePage);
  void* data = nullptr;
  const bool may_fit = load_state.available_bytes == 0 || size <= load_state.available_bytes;
#if defined(__linux__)
  if (may_fit) {
    data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) data = nullptr;
  }
  if (data != nullptr && bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
  if (data != nullptr && load_state.lock_memory && mlock(data, bytes) != 0) {
    GGML_LOG_WARN("%zu bytes of repacked weights can't be locked into memory\n", bytes);
  }
#else
  if (may_fit) data = std::aligned_alloc(4096, bytes);
#endif
  if (data == nullptr) {
    load_state.ran_out = true;
    GGML_LOG_WARN("no memory for %zu bytes of repacked weights: ggml's kernels run this model\n",
                  size);
    return nullptr;
  }
  ggml_backend_buffer_i functions{};
  functions.free_buffer = free_weights;
  functions.get_base = base_of_weights;
  functions.set_tensor = set_weights;
  functions.clear = clear_weights;
  return ggml_backend_buffer_init(type, functions, new WeightBuffer{data, bytes}, size);
}

std::size_t alignment_of_weights(ggml_backend_buffer_type_t) { return 64; }

std::size_t size_of_weights(ggml_backend_buffer_type_t, const ggml_tensor* tensor) {
  WeightFormat format;
  if (!find_format(tensor->type, format)) return ggml_nbytes(tensor);
  return static_cast<std::size_t>(tensor->ne[2] * tensor->ne[3]) *
         PackedTensor(*tensor).matrix_bytes;
}

// ---- Work shared by the threads of a graph

/// Calls f(item) for each of count() items, on whichever thread is free. All threads call it. What
/// one thread prepared before is known to all behind the barrier, the count included.
template <typename Count, typename F>
void share_items(const ggml_compute_params& params, const Count& count, const F& f) {
  if (params.ith == 0) ggml_threadpool_chunk_set(params.threadpool, params.nth);
  ggml_barrier(params.threadpool);
  const std::int64_t num_items = count();
  for (std::int64_t item = params.ith; item < num_items;
       item = ggml_threadpool_chunk_add(params.threadpool, 1)) {
    f(item);
  }
}

// Hands out a thread team's work buffer.
class WorkBuffer {
 public:
  explicit WorkBuffer(void* data) : at_(static_cast<std::uint8_t*>(data)) {
    const auto address = reinterpret_cast<std::uintptr_t>(at_);
    at_ += round_up(address, 64) - address;
  }
  template <typename T>
  T* take(std::int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += round_up(sizeof(T) * static_cast<std::size_t>(count), 64);
    return taken;
  }
  template <typename T>
  static std::size_t bytes(std::int64_t count) {
    return 64 + round_up(sizeof(T) * static_cast<std::size_t>(count), 64);
  }

 private:
  std::uint8_t* at_;
};

class Traits : public ggml::cpu::tensor_traits {
 public:
  void use(const KernelSet& kernels) { kernels_ = &kernels; }

 protected:
  const KernelSet* kernels_ = nullptr;
};

// ---- Matrix products

// The activation rows of a product, by number: rows of dimension 1, then 2, then 3.
const float* activation_row(const ggml_tensor& x, std::int64_t row) {
  const std::int64_t i1 = row % x.ne[1];
  const std::int64_t i2 = row / x.ne[1] % x.ne[2];
  const std::int64_t i3 = row / x.ne[1] / x.ne[2];
  return reinterpret_cast<const float*>(
      static_cast<const char*>(x.data) + static_cast<std::size_t>(i1) * x.nb[1] +
      static_cast<std::size_t>(i2) * x.nb[2] + static_cast<std::size_t>(i3) * x.nb[3]);
}

float* output_row(const ggml_tensor& y, std::int64_t row) {
  return const_cast<float*>(activation_row(y, row));
}

class Products final : public Traits {
 public:
  bool work_size(int, const ggml_tensor* op, std::size_t& size) override {
    if (op->op == GGML_OP_GET_ROWS) {
      size = 0;
      return true;
    }
    const std::int64_t num_rows = ggml_nrows(op->src[1]);
    const std::int64_t num_outputs =
        op->op == GGML_OP_MUL_MAT_ID ? ggml_nelements(op->src[2]) : num_rows;
    size = WorkBuffer::bytes<ActivationBlock>(num_rows * blocks_per_row(*op->src[0])) +
           2 * WorkBuffer::bytes<void*>(num_outputs) +
           WorkBuffer::bytes<std::int64_t>(op->src[0]->ne[2] + 1);
    return true;
  }

  bool compute_forward(ggml_compute_params* params, ggml_tensor* op) override {
    const ggml_tensor* weights = op->src[0];
    GGML_ASSERT(weights->view_src == nullptr && "views of packed weights are not supported");
    if (op->op == GGML_OP_GET_ROWS) {
      get_rows(*params, *op);
    } else if (op->op == GGML_OP_MUL_MAT) {
      multiply(*params, *op);
    } else {
      multiply_by_expert(*params, *op);
    }
    return true;
  }

 private:
  static std::int64_t blocks_per_row(const ggml_tensor& weights) {
    WeightFormat format;
    GGML_ASSERT(find_format(weights.type, format));
    return layout_of(format).is_float() ? 0 : weights.ne[0] / kBlockColumns;
  }

  [[nodiscard]] const FormatKernels& kernels_of(WeightFormat format) const {
    return kernels_->formats[static_cast<int>(format)];
  }

  static std::int64_t begin_of(std::int64_t count, int part, int parts) {
    return count * part / parts;
  }

  /// Groups that one item of work computes: even, since a tile takes two, and few enough that
  /// threads end together.
  static std::int64_t groups_per_item(std::int64_t num_groups, int num_threads) {
    constexpr std::int64_t kItemsPerThread = 8;
    const std::int64_t share = num_groups / (kItemsPerThread * num_threads);
    return std::max<std::int64_t>(2, share / 2 * 2);
  }

  // Activations as blocks; the caller's threads share the rows.
  const void* prepare_row(const PackedTensor& packed, const float* row, ActivationBlock* blocks,
                          std::int64_t index) const {
    const FormatKernels& kernels = kernels_of(packed.format);
    if (kernels.quantize == nullptr) return row;
    ActivationBlock* to = blocks + index * (packed.columns / kBlockColumns);
    kernels.quantize(row, packed.columns, to);
    return to;
  }

  void multiply(const ggml_compute_params& params, ggml_tensor& op) const {
    const PackedTensor packed(*op.src[0]);
    const ggml_tensor& x = *op.src[1];
    const std::int64_t num_rows = ggml_nrows(&x);
    WorkBuffer work(params.wdata);
    auto* blocks = work.take<ActivationBlock>(num_rows * blocks_per_row(*op.src[0]));
    const auto** rows = work.take<const void*>(num_rows);
    auto** outputs = work.take<float*>(num_rows);
    const std::int64_t end = begin_of(num_rows, params.ith + 1, params.nth);
    for (std::int64_t i = begin_of(num_rows, params.ith, params.nth); i < end; ++i) {
      rows[i] = prepare_row(packed, activation_row(x, i), blocks, i);
      outputs[i] = output_row(op, i);
    }
    const std::int64_t per_item = groups_per_item(packed.num_groups, params.nth);
    const auto count = [&] { return (packed.num_groups + per_item - 1) / per_item; };
    share_items(params, count, [&](std::int64_t item) {
      kernels_of(packed.format)
          .multiply({.weights = static_cast<const std::uint8_t*>(op.src[0]->data),
                     .columns = packed.columns,
                     .num_outputs = packed.num_outputs,
                     .begin_group = item * per_item,
                     .end_group = std::min((item + 1) * per_item, packed.num_groups),
                     .activations = rows,
                     .outputs = outputs,
                     .num_rows = num_rows});
    });
  }

  // Rows are sorted by the expert that they go to; each expert is a product of its own.
  void multiply_by_expert(const ggml_compute_params& params, ggml_tensor& op) const {
    const PackedTensor packed(*op.src[0]);
    const ggml_tensor& x = *op.src[1];
    const ggml_tensor& ids = *op.src[2];
    const std::int64_t num_experts = op.src[0]->ne[2];
    const std::int64_t num_rows = ggml_nrows(&x);
    const std::int64_t num_outputs = ggml_nelements(&ids);
    WorkBuffer work(params.wdata);
    auto* blocks = work.take<ActivationBlock>(num_rows * blocks_per_row(*op.src[0]));
    const auto** rows = work.take<const void*>(num_outputs);
    auto** outputs = work.take<float*>(num_outputs);
    auto* first = work.take<std::int64_t>(num_experts + 1);
    const bool is_quantized = kernels_of(packed.format).quantize != nullptr;
    const std::int64_t end = begin_of(num_rows, params.ith + 1, params.nth);
    for (std::int64_t i = begin_of(num_rows, params.ith, params.nth); is_quantized && i < end;
         ++i) {
      prepare_row(packed, activation_row(x, i), blocks, i);
    }
    if (params.ith == 0) {
      const auto expert_of = [&](std::int64_t token, std::int64_t slot) {
        const auto id = *reinterpret_cast<const std::int32_t*>(
            static_cast<const char*>(ids.data) + static_cast<std::size_t>(slot) * ids.nb[0] +
            static_cast<std::size_t>(token) * ids.nb[1]);
        GGML_ASSERT(id >= 0 && id < num_experts);
        return id;
      };
      std::fill(first, first + num_experts + 1, 0);
      for (std::int64_t i = 0; i < num_outputs; ++i) {
        ++first[expert_of(i / ids.ne[0], i % ids.ne[0]) + 1];
      }
      for (std::int64_t e = 0; e < num_experts; ++e) first[e + 1] += first[e];
      for (std::int64_t i = num_outputs - 1; i >= 0; --i) {  // from the end: first[] counts down
        const std::int64_t token = i / ids.ne[0];
        const std::int64_t slot = i % ids.ne[0];
        const std::int64_t to = --first[expert_of(token, slot) + 1];
        const std::int64_t row = token * x.ne[1] + slot % x.ne[1];
        rows[to] = is_quantized
                       ? static_cast<const void*>(blocks + row * (packed.columns / kBlockColumns))
                       : activation_row(x, row);
        outputs[to] = output_row(op, token * op.ne[1] + slot);
      }
      std::rotate(first, first + 1, first + num_experts + 1);
      first[num_experts] = num_outputs;
    }
    const std::int64_t per_item = groups_per_item(packed.num_groups, params.nth);
    const std::int64_t per_expert = (packed.num_groups + per_item - 1) / per_item;
    const auto count = [&] { return num_experts * per_expert; };
    share_items(params, count, [&](std::int64_t item) {
      const std::int64_t expert = item / per_expert;
      const std::int64_t chunk = item % per_expert;
      const std::int64_t begin = first[expert];
      if (first[expert + 1] == begin) return;
      kernels_of(packed.format)
          .multiply({.weights = static_cast<const std::uint8_t*>(op.src[0]->data) +
                                static_cast<std::size_t>(expert) * packed.matrix_bytes,
                     .columns = packed.columns,
                     .num_outputs = packed.num_outputs,
                     .begin_group = chunk * per_item,
                     .end_group = std::min((chunk + 1) * per_item, packed.num_groups),
                     .activations = rows + begin,
                     .outputs = outputs + begin,
                     .num_rows = first[expert + 1] - begin});
    });
  }

  static void get_rows(const ggml_compute_params& params, ggml_tensor& op) {
    const PackedTensor packed(*op.src[0]);
    const ggml_tensor& ids = *op.src[1];
    const std::int64_t count = ggml_nelements(&ids);
    const std::int64_t end = begin_of(count, params.ith + 1, params.nth);
    for (std::int64_t i = begin_of(count, params.ith, params.nth); i < end; ++i) {
      const auto id = *reinterpret_cast<const std::int32_t*>(
          static_cast<const char*>(ids.data) + static_cast<std::size_t>(i % ids.ne[0]) * ids.nb[0] +
          static_cast<std::size_t>(i / ids.ne[0] % ids.ne[1]) * ids.nb[1] +
          static_cast<std::size_t>(i / ids.ne[0] / ids.ne[1]) * ids.nb[2]);
      GGML_ASSERT(id >= 0 && id < packed.num_outputs);
      unpack_row(packed.format, static_cast<const std::uint8_t*>(op.src[0]->data), id,
                 packed.columns, output_row(op, i));
    }
  }
};

// ---- Gated units

bool is_supported_gate(const ggml_tensor& op, Gate& function) {
  switch (ggml_get_glu_op(&op)) {
    case GGML_GLU_OP_SWIGLU:
      function = Gate::kSilu;
      break;
    case GGML_GLU_OP_GEGLU:
      function = Gate::kGelu;
      break;
    default:
      return false;
  }
  const ggml_tensor& x = *op.src[0];
  const ggml_tensor* gates = op.src[1];
  return x.type == GGML_TYPE_F32 && op.type == GGML_TYPE_F32 && ggml_is_contiguous_1(&x) &&
         ggml_is_contiguous_1(&op) &&
         (gates == nullptr || (gates->type == GGML_TYPE_F32 && ggml_is_contiguous_1(gates)));
}

class GatedUnits final : public Traits {
 public:
  bool work_size(int, const ggml_tensor*, std::size_t& size) override {
    size = 0;
    return true;
  }

  bool compute_forward(ggml_compute_params* params, ggml_tensor* op) override {
    Gate function{};
    GGML_ASSERT(is_supported_gate(*op, function));
    // One tensor holds both halves of a row, or each has its own.
    const ggml_tensor& x = *op->src[0];
    const ggml_tensor* gates = op->src[1];
    const std::int64_t width = op->ne[0];
    const bool is_swapped = ggml_get_op_params_i32(op, 1) != 0;
    const std::int64_t num_rows = ggml_nrows(op);
    const std::int64_t end = num_rows * (params->ith + 1) / params->nth;
    for (std::int64_t i = num_rows * params->ith / params->nth; i < end; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const auto* of_x =
          reinterpret_cast<const float*>(static_cast<const char*>(x.data) + row * x.nb[1]);
      const float* of_gates = of_x + (is_swapped ? 0 : width);
      if (gates != nullptr) {
        of_gates = reinterpret_cast<const float*>(static_cast<const char*>(gates->data) +
                                                  row * gates->nb[1]);
      } else if (is_swapped) {
        of_x += width;
      }
      kernels_->gate(function, of_x, of_gates, width,
                     reinterpret_cast<float*>(static_cast<char*>(op->data) + row * op->nb[1]));
    }
    return true;
  }
};

// ---- Attention

CacheType cache_type(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F16:
      return CacheType::kF16;
    case GGML_TYPE_BF16:
      return CacheType::kBF16;
    case GGML_TYPE_F32:
      return CacheType::kF32;
    default:
      return CacheType::kOther;
  }
}

bool is_supported_attention(const ggml_tensor& op) {
  const ggml_tensor& q = *op.src[0];
  const ggml_tensor& k = *op.src[1];
  const ggml_tensor& v = *op.src[2];
  const ggml_tensor* mask = op.src[3];
  const auto is_readable = [](const ggml_tensor& t) {
    return t.nb[0] == ggml_type_size(t.type) && (cache_type(t.type) != CacheType::kOther ||
                                                 ggml_get_type_traits(t.type)->to_float != nullptr);
  };
  return q.type == GGML_TYPE_F32 && q.nb[0] == sizeof(float) && is_readable(k) && is_readable(v) &&
         mask != nullptr && mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 &&
         mask->nb[0] == sizeof(std::uint16_t) && mask->ne[1] >= q.ne[1] && mask->ne[3] == q.ne[3] &&
         k.ne[3] == q.ne[3] && v.ne[3] == q.ne[3] && k.ne[2] == v.ne[2] && q.ne[2] % k.ne[2] == 0 &&
         q.ne[0] == k.ne[0] && op.type == GGML_TYPE_F32;
}

class AttentionOp final : public Traits {
 public:
  bool work_size(int num_threads, const ggml_tensor* op, std::size_t& size) override {
    size = 64 + static_cast<std::size_t>(num_threads) * scratch_bytes(*op);
    return true;
  }

  bool compute_forward(ggml_compute_params* params, ggml_tensor* op) override {
    CacheScope::Cache* cache = Registry::instance().find(root_of(cache_view(op->src[1])));
    GGML_ASSERT(cache != nullptr);
    Job job(*kernels_, *params, *op, *cache);
    job.run();
    return true;
  }

 private:
  static std::size_t scratch_bytes(const ggml_tensor& op) {
    return round_up(sizeof(float) * attention_scratch(static_cast<std::int32_t>(op.src[1]->ne[0]),
                                                      static_cast<std::int32_t>(op.src[2]->ne[0])),
                    64);
  }

  // One operation, as one thread sees it.
  class Job {
   public:
    Job(const KernelSet& kernels, const ggml_compute_params& params, ggml_tensor& op,
        CacheScope::Cache& cache)
        : kernels_(kernels), params_(params), op_(op), cache_(cache) {
      const ggml_tensor& q = *op.src[0];
      const ggml_tensor& mask = *op.src[3];
      heads_per_kv_ = static_cast<std::int32_t>(q.ne[2] / op.src[1]->ne[2]);
      mask_ = {.data = static_cast<const std::uint8_t*>(mask.data),
               .row_stride = mask.nb[1],
               .stream_stride = mask.nb[3],
               .num_cells = op.src[1]->ne[1],
               .num_rows = q.ne[1],
               .num_streams = q.ne[3]};
      std::memcpy(&scale_, op.op_params, sizeof scale_);
      std::memcpy(&max_bias_, op.op_params + 1, sizeof max_bias_);
      std::memcpy(&softcap_, op.op_params + 2, sizeof softcap_);
      if (softcap_ != 0.0F) scale_ /= softcap_;
      WorkBuffer work(params.wdata);
      scratch_ = reinterpret_cast<float*>(work.take<std::uint8_t>(0) +
                                          static_cast<std::size_t>(params.ith) * scratch_bytes(op));
    }

    void run() {
      make_plan();
      if (params_.ith == 0) divide();
      const auto per_task = [this] { return std::max<std::int64_t>(cache_.spans_per_tile, 1); };
      const auto count = [&] { return num_tasks() * per_task(); };
      share_items(params_, count, [&](std::int64_t item) {
        attend(item / per_task(), static_cast<std::int32_t>(item % per_task()));
      });
      if (cache_.spans_per_tile > 0) {
        ggml_barrier(params_.threadpool);
        merge_spans();
      }
    }

   private:
    // Rows of a tile: as many as a task may have query vectors.
    [[nodiscard]] std::int32_t rows_per_tile() const {
      constexpr std::int32_t kMostRows = 16;
      return std::clamp(kMaxQueries / heads_per_kv_, 1, kMostRows);
    }

    // The first layer of a cache comes first in every graph. Those behind it see the same mask.
    void make_plan() {
      AttentionPlan& plan = cache_.plan;
      const bool is_first = root_of(cache_view(op_.src[1])) == cache_.layers.front();
      if (!is_first && plan.is_for(mask_, rows_per_tile())) return;
      ggml_barrier(params_.threadpool);  // until all threads have looked at the plan
      if (params_.ith == 0) {
        const ggml_tensor& k = *cache_view(op_.src[1]);
        cache_.positions->read(static_cast<std::int32_t>(k.view_offs / k.nb[3]),
                               static_cast<std::int32_t>(mask_.num_streams),
                               static_cast<std::int32_t>(mask_.num_cells), plan.begin(mask_));
      }
      ggml_barrier(params_.threadpool);
      plan.scan(kernels_, params_.ith, params_.nth);
      ggml_barrier(params_.threadpool);
      if (params_.ith == 0) plan.finish(rows_per_tile());
      ggml_barrier(params_.threadpool);
    }

    [[nodiscard]] std::int64_t num_kv_heads() const { return op_.src[1]->ne[2]; }

    // Heads of a task: all that share K and V, fewer where the threads would lack work.
    [[nodiscard]] std::int32_t heads_per_task() const {
      const auto most = std::min(heads_per_kv_, kMaxQueries / rows_per_tile());
      const std::int64_t tasks =
          static_cast<std::int64_t>(cache_.plan.tiles().size()) * num_kv_heads();
      if (tasks >= 2 * params_.nth) return most;
      const std::int64_t parts = std::min<std::int64_t>(heads_per_kv_, 2 * params_.nth);
      return std::min(most, static_cast<std::int32_t>((heads_per_kv_ + parts - 1) / parts));
    }
    [[nodiscard]] std::int64_t parts_of_heads() const {
      return (heads_per_kv_ + heads_per_task() - 1) / heads_per_task();
    }
    [[nodiscard]] std::int64_t num_tasks() const {
      return static_cast<std::int64_t>(cache_.plan.tiles().size()) * num_kv_heads() *
             parts_of_heads();
    }

    // Few tasks with long contexts are divided by spans, too.
    void divide() {
      cache_.spans_per_tile = 0;
      if (params_.nth == 1 || num_tasks() >= 4 * params_.nth) return;
      std::int32_t spans = 0;
      for (const AttentionPlan::Tile& tile : cache_.plan.tiles()) {
        spans = std::max(spans, cache_.plan.num_spans(tile));
      }
      if (spans < 2) return;
      cache_.spans_per_tile = spans;
      cache_.partials.resize(static_cast<std::size_t>(num_tasks() * spans) * task_partials());
    }

    [[nodiscard]] std::size_t partial_size() const {
      return 2 + static_cast<std::size_t>(op_.src[2]->ne[0]);
    }
    /// Floats of the partial results of one task over one span.
    [[nodiscard]] std::size_t task_partials() const {
      return static_cast<std::size_t>(rows_per_tile() * heads_per_task()) * partial_size();
    }
    [[nodiscard]] float* partials_of(std::int64_t task, std::int32_t span) const {
      return cache_.partials.data() +
             static_cast<std::size_t>(task * cache_.spans_per_tile + span) * task_partials();
    }

    // Calls f with what a task is about, slopes and masks included.
    template <typename F>
    void with_task(std::int64_t index, const F& f) const {
      const std::int64_t parts = parts_of_heads();
      const AttentionPlan::Tile& tile =
          cache_.plan.tiles()[static_cast<std::size_t>(index / parts / num_kv_heads())];
      const auto kv_head = static_cast<std::size_t>(index / parts % num_kv_heads());
      const auto first = static_cast<std::int32_t>(index % parts) * heads_per_task();
      const std::int32_t num_heads = std::min(heads_per_task(), heads_per_kv_ - first);
      const std::size_t head =
          kv_head * static_cast<std::size_t>(heads_per_kv_) + static_cast<std::size_t>(first);
      const auto stream = static_cast<std::size_t>(tile.first_row / mask_.num_rows);
      const auto row = static_cast<std::size_t>(tile.first_row % mask_.num_rows);
      const ggml_tensor& q = *op_.src[0];
      float slopes[kMaxQueries];
      for (std::int32_t i = 0; i < num_heads; ++i)
        slopes[i] = slope(head + static_cast<std::size_t>(i));
      const std::uint16_t* masks[kMaxQueries];
      for (std::int32_t i = 0; i < tile.num_rows; ++i) masks[i] = mask_.row(tile.first_row + i);
      AttentionTask task{};
      task.key_size = static_cast<std::int32_t>(q.ne[0]);
      task.value_size = static_cast<std::int32_t>(op_.src[2]->ne[0]);
      task.num_rows = tile.num_rows;
      task.num_heads = num_heads;
      task.scale = scale_;
      task.softcap = softcap_;
      task.slopes = slopes;
      task.queries = static_cast<const std::uint8_t*>(q.data) + row * q.nb[1] + head * q.nb[2] +
                     stream * q.nb[3];
      task.query_row_stride = q.nb[1];
      task.query_head_stride = q.nb[2];
      task.keys = cache_rows(*op_.src[1], kv_head, stream);
      task.values = cache_rows(*op_.src[2], kv_head, stream);
      task.cells = cache_.plan.cells();
      task.block_ids = cache_.plan.block_ids();
      task.masks = masks;
      if (op_.src[4] != nullptr) task.sinks = static_cast<const float*>(op_.src[4]->data) + head;
      const auto num_q_heads = static_cast<std::size_t>(q.ne[2]);
      task.output_head_stride = static_cast<std::size_t>(op_.ne[0]);
      task.output_row_stride = num_q_heads * task.output_head_stride;
      task.outputs = static_cast<float*>(op_.data) +
                     static_cast<std::size_t>(tile.first_row) * task.output_row_stride +
                     head * task.output_head_stride;
      f(tile, task);
    }

    static CacheRows cache_rows(const ggml_tensor& cache, std::size_t head, std::size_t stream) {
      return {.base = static_cast<const std::uint8_t*>(cache.data) + head * cache.nb[2] +
                      stream * cache.nb[3],
              .stride = cache.nb[1],
              .type = cache_type(cache.type),
              .to_float = ggml_get_type_traits(cache.type)->to_float};
    }

    // ALiBi: what the mask, which holds distances then, is multiplied by.
    [[nodiscard]] float slope(std::size_t head) const {
      if (max_bias_ <= 0.0F) return 1.0F;
      const auto num_heads = static_cast<double>(op_.src[0]->ne[2]);
      const double power = std::exp2(std::floor(std::log2(num_heads)));
      const auto h = static_cast<double>(head);
      return static_cast<float>(h < power
                                    ? std::exp2(-max_bias_ / power * (h + 1))
                                    : std::exp2(-max_bias_ / 2 / power * (2 * (h - power) + 1)));
    }

    void attend(std::int64_t index, std::int32_t span) const {
      with_task(index, [&](const AttentionPlan::Tile& tile, AttentionTask& task) {
        std::int32_t begin = tile.begin_block;
        std::int32_t end = tile.end_block;
        if (cache_.spans_per_tile > 0) {
          for (std::int32_t i = 0; i < span && begin < tile.end_block; ++i) {
            begin = cache_.plan.end_of_span(tile, begin);
          }
          end = begin < tile.end_block ? cache_.plan.end_of_span(tile, begin) : begin;
          task.partials = partials_of(index, span);
          task.partial_stride = partial_size();
        }
        task.cells += begin * kKeyBlock;
        task.block_ids += begin;
        task.num_blocks = end - begin;
        kernels_.attend(task, scratch_);
      });
    }

    void merge_spans() {
      for (std::int64_t index = params_.ith; index < num_tasks(); index += params_.nth) {
        with_task(index, [&](const AttentionPlan::Tile&, const AttentionTask& task) {
          for (std::int32_t q = 0; q < task.num_rows * task.num_heads; ++q) {
            const auto row = static_cast<std::size_t>(q / task.num_heads);
            const auto head = static_cast<std::size_t>(q % task.num_heads);
            kernels_.merge(
                {.partials = partials_of(index, 0) + static_cast<std::size_t>(q) * partial_size(),
                 .span_stride = task_partials(),
                 .num_spans = cache_.spans_per_tile,
                 .value_size = task.value_size,
                 .sink = task.sinks == nullptr ? nullptr : task.sinks + head,
                 .output =
                     task.outputs + row * task.output_row_stride + head * task.output_head_stride});
          }
        });
      }
    }

    const KernelSet& kernels_;
    const ggml_compute_params& params_;
    ggml_tensor& op_;
    CacheScope::Cache& cache_;
    std::int32_t heads_per_kv_;
    MaskView mask_{};
    float scale_ = 1.0F;
    float max_bias_ = 0.0F;
    float softcap_ = 0.0F;
    float* scratch_;
  };
};

// ---- The buffer type

class BufferType final : public ggml::cpu::extra_buffer_type {
 public:
  explicit BufferType(const KernelSet& kernels) {
    products_.use(kernels);
    attention_.use(kernels);
    gates_.use(kernels);
    type_.iface.get_name = name_of_type;
    type_.iface.alloc_buffer = allocate_weights;
    type_.iface.get_alignment = alignment_of_weights;
    type_.iface.get_alloc_size = size_of_weights;
    type_.device = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    type_.context = this;
  }

  [[nodiscard]] ggml_backend_buffer_type_t handle() { return &type_; }

  // Asked by the loader, with an empty buffer, for each weight; and by the scheduler for each node.
  bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) override {
    const ggml_tensor* weights = op->src[0];
    if (!is_ours(weights)) return false;
    if (weights->data == nullptr && !load_state.enabled) return false;
    WeightFormat format;
    if (!find_format(weights->type, format)) return false;
    switch (op->op) {
      case GGML_OP_MUL_MAT:
        return weights->ne[2] == 1 && weights->ne[3] == 1 && op->src[1]->type == GGML_TYPE_F32 &&
               ggml_is_contiguous(weights);
      case GGML_OP_MUL_MAT_ID:
        return weights->ne[3] == 1 && op->src[1]->type == GGML_TYPE_F32;
      case GGML_OP_GET_ROWS:
        return weights->ne[2] == 1 && weights->ne[3] == 1;
      default:
        return false;
    }
  }

  ggml::cpu::tensor_traits* get_tensor_traits(const ggml_tensor* op) override {
    switch (op->op) {
      case GGML_OP_MUL_MAT:
      case GGML_OP_MUL_MAT_ID:
      case GGML_OP_GET_ROWS:
        if (is_ours(op->src[0])) return &products_;
        break;
      case GGML_OP_GLU: {
        // Only in models of ours: what feeds it was multiplied by our kernels.
        Gate function{};
        if (is_of_ours(op->src[0]) && is_supported_gate(*op, function)) return &gates_;
        break;
      }
      case GGML_OP_FLASH_ATTN_EXT:
        if (is_supported_attention(*op) &&
            Registry::instance().find(root_of(cache_view(op->src[1]))) != nullptr) {
          return &attention_;
        }
        break;
      default:
        break;
    }
    note(*op);
    return nullptr;
  }

 private:
  [[nodiscard]] bool is_ours(const ggml_tensor* tensor) const {
    return tensor != nullptr && tensor->buffer != nullptr && tensor->buffer->buft == &type_;
  }

  [[nodiscard]] bool is_of_ours(const ggml_tensor* tensor) const {
    while (tensor != nullptr && tensor->op != GGML_OP_MUL_MAT && tensor->op != GGML_OP_MUL_MAT_ID) {
      tensor = tensor->src[0];
    }
    return tensor != nullptr && is_ours(tensor->src[0]);
  }

  // Operations of ggml whose sums depend on the number of rows, the cells of others or the chunk.
  static void note(const ggml_tensor& op) {
    if (variant_operations == nullptr) return;
    switch (op.op) {
      case GGML_OP_MUL_MAT:
      case GGML_OP_OUT_PROD:
        *variant_operations |= kMatrixProduct;
        break;
      case GGML_OP_MUL_MAT_ID:
        *variant_operations |= kExpertProduct;
        break;
      case GGML_OP_FLASH_ATTN_EXT:
        *variant_operations |= kAttention;
        break;
      case GGML_OP_SOFT_MAX:
        // Without a mask, rows have a fixed length: the experts that a token may go to. Attention
        // without a mask is found by its products.
        if (op.src[1] != nullptr) *variant_operations |= kAttention;
        break;
      case GGML_OP_GATED_DELTA_NET:
      case GGML_OP_GATED_LINEAR_ATTN:
        *variant_operations |= kLinearAttention;
        break;
      default:
        break;
    }
  }

  ggml_backend_buffer_type type_{};
  Products products_;
  AttentionOp attention_;
  GatedUnits gates_;
};

}  // namespace

void install() {
  static std::once_flag once;
  std::call_once(once, [] {
    const KernelSet* kernels = best_kernels();
    if (kernels == nullptr) return;
    static BufferType type(*kernels);
    auto& types = ggml_backend_cpu_get_extra_buffer_types();
    types.insert(types.begin(), type.handle());
  });
}

bool is_available() { return best_kernels() != nullptr; }

const char* active_name() {
  const KernelSet* kernels = best_kernels();
  return kernels == nullptr ? "ggml" : kernels->name;
}

LoadScope::LoadScope(bool enabled, int num_threads, std::uint64_t available_bytes,
                     bool lock_memory) {
  load_state = {.enabled = enabled,
                .num_threads = num_threads,
                .available_bytes = available_bytes,
                .lock_memory = lock_memory,
                .ran_out = false};
}
LoadScope::~LoadScope() { load_state = {}; }
bool LoadScope::ran_out_of_memory() const { return load_state.ran_out; }

CacheScope::CacheScope(std::vector<const void*> layers, std::unique_ptr<CellPositions> positions)
    : cache_(std::make_unique<Cache>()) {
  cache_->layers = std::move(layers);
  cache_->positions = std::move(positions);
  Registry::instance().add(*cache_);
}
CacheScope::~CacheScope() { Registry::instance().remove(*cache_); }

VariantWatch::VariantWatch(std::uint32_t& operations) { variant_operations = &operations; }
VariantWatch::~VariantWatch() { variant_operations = nullptr; }

}  // namespace batchcore::kernels
