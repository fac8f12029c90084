// One llama_context with what belongs to it: its thread pool and the flag that interrupts it.
// Shared by LlamaBackend and the low-level Context, so that both create contexts under the same
// guards. Owned and used by one thread; interrupt() may come from any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/types.h"
#include "kernels/seam.h"
#include "llama/llama_model.h"

struct ggml_threadpool;
struct llama_context;

namespace batchcore {

enum class FlashAttention { kAuto, kOff, kOn };

/// What becomes of the per-token embeddings of a sequence.
enum class Pooling { kModel, kNone, kMean, kCls, kLast, kRank };

/// How to make a context. Names are llama.cpp's where it has one.
struct ContextParams {
  std::int32_t n_ctx = 0;            ///< KV cells in all, 0 = what the model was trained with
  std::int32_t num_slots = 1;        ///< sequences at a time (n_seq_max)
  std::int32_t n_ubatch = 512;       ///< tokens that llama.cpp computes at once
  std::int32_t n_batch = 0;          ///< tokens per decode call, 0 = n_ubatch
  std::int32_t max_outputs = 0;      ///< rows with logits per call, 0 = num_slots
  std::int32_t n_threads = 0;        ///< for one token, 0 = usable cores
  std::int32_t n_threads_batch = 0;  ///< for more than one token, 0 = n_threads
  KvLayout layout = KvLayout::kUnified;
  std::string type_k = "f16";  ///< ggml's name of the type of the K cache
  std::string type_v = "f16";  ///< and of the V cache; quantised needs flash attention
  FlashAttention flash_attn = FlashAttention::kAuto;
  bool swa_full = true;     ///< full-size cells for sliding-window layers
  bool offload_kqv = true;  ///< KV cells in GPU memory
  bool op_offload = true;   ///< large operations on host weights go to the GPU
  bool embeddings = false;  ///< output embeddings too; then every token is an output
  Pooling pooling = Pooling::kModel;
  /// How long idle threads spin between graphs, 0..100. The default leaves the cores to the
  /// samplers; waking them costs some 20 microseconds per step.
  std::int32_t poll = 0;
};

/// Bytes of a context by purpose, over all devices.
struct ContextMemory {
  std::uint64_t model_bytes = 0;
  std::uint64_t context_bytes = 0;  ///< KV cells and recurrent states
  std::uint64_t compute_bytes = 0;
};

class Context {
 public:
  /// Throws ConfigError for parameters that can't work and EngineError where memory runs out, with
  /// llama.cpp's reason.
  Context(std::shared_ptr<const LlamaModel> model, const ContextParams& params);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// Frees llama.cpp's part at once; only the plain values below remain usable. Idempotent.
  void close();

  /// Null once closed.
  [[nodiscard]] llama_context* get() const { return context_; }
  [[nodiscard]] const LlamaModel& model() const { return *model_; }

  /// The parameters with every default filled in and as llama.cpp rounded them.
  [[nodiscard]] const ContextParams& params() const { return params_; }

  [[nodiscard]] std::int32_t cells_per_slot() const { return cells_per_slot_; }
  [[nodiscard]] bool has_memory() const { return has_memory_; }

  /// Whether batchcore's kernels compute the attention: each row then goes over positions of its
  /// own sequence only.
  [[nodiscard]] bool uses_attention_kernels() const { return uses_attention_kernels_; }

  /// What a user should know about these parameters.
  [[nodiscard]] const std::vector<std::string>& warnings() const { return warnings_; }

  [[nodiscard]] ContextMemory memory_usage() const;

  /// How many decode calls reused the graph of the one before.
  [[nodiscard]] std::int64_t num_graphs_reused() const;

  /// Makes the running decode return early, or the next one where none runs. Any thread. Only the
  /// CPU looks at it.
  void interrupt() { interrupted_.store(true, std::memory_order_relaxed); }
  void clear_interrupt() { interrupted_.store(false, std::memory_order_relaxed); }

 private:
  void create(const ContextParams& wanted);
  void attach_threads();

  std::shared_ptr<const LlamaModel> model_;
  ContextParams params_;
  std::int32_t cells_per_slot_ = 0;
  bool has_memory_ = false;
  bool uses_attention_kernels_ = false;
  std::vector<std::string> warnings_;
  std::atomic<bool> interrupted_{false};
  ggml_threadpool* threads_ = nullptr;
  llama_context* context_ = nullptr;
  std::vector<std::unique_ptr<kernels::CacheScope>> attention_kernels_;
};

}  // namespace batchcore
