#include "llama/context.h"

#include <ggml-cpu.h>
#include <llama.h>
// The memory breakdown is not in llama.h yet; upstream's staging header is C++ and may change.
#include <../src/llama-ext.h>
// Nor is what became of flash attention "auto".
#include <../src/llama-context.h>

#include <algorithm>
#include <array>
#include <climits>
#include <exception>
#include <new>
#include <string_view>
#include <utility>

#include "core/errors.h"
#include "llama/cpu_count.h"
#include "llama/kv_caches.h"
#include "llama/llama_log.h"
#include "llama/memory_guard.h"

namespace batchcore {
namespace {

// The types that llama.cpp has attention kernels for; with others the first decode aborts.
constexpr std::array kCacheTypes = {GGML_TYPE_F32,    GGML_TYPE_F16,  GGML_TYPE_BF16,
                                    GGML_TYPE_Q8_0,   GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                                    GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1};

ggml_type cache_type(const std::string& name, const char* parameter) {
  std::string known;
  for (const ggml_type type : kCacheTypes) {
    if (name == ggml_type_name(type)) return type;
    known += (known.empty() ? "" : ", ") + std::string(ggml_type_name(type));
  }
  throw ConfigError(std::string(parameter) + " must be one of " + known + ", not '" + name + "'");
}

enum llama_pooling_type pooling_type(Pooling pooling) {
  switch (pooling) {
    case Pooling::kModel:
      return LLAMA_POOLING_TYPE_UNSPECIFIED;
    case Pooling::kNone:
      return LLAMA_POOLING_TYPE_NONE;
    case Pooling::kMean:
      return LLAMA_POOLING_TYPE_MEAN;
    case Pooling::kCls:
      return LLAMA_POOLING_TYPE_CLS;
    case Pooling::kLast:
      return LLAMA_POOLING_TYPE_LAST;
    case Pooling::kRank:
      return LLAMA_POOLING_TYPE_RANK;
  }
  return LLAMA_POOLING_TYPE_UNSPECIFIED;
}

llama_flash_attn_type flash_attn_type(FlashAttention mode) {
  switch (mode) {
    case FlashAttention::kAuto:
      return LLAMA_FLASH_ATTN_TYPE_AUTO;
    case FlashAttention::kOff:
      return LLAMA_FLASH_ATTN_TYPE_DISABLED;
    case FlashAttention::kOn:
      return LLAMA_FLASH_ATTN_TYPE_ENABLED;
  }
  return LLAMA_FLASH_ATTN_TYPE_AUTO;
}

void require_range(const char* name, std::int32_t value, std::int32_t min, std::int32_t max) {
  if (value >= min && value <= max) return;
  throw ConfigError(std::string(name) + " must be from " + std::to_string(min) + " to " +
                    std::to_string(max) + ", not " + std::to_string(value));
}

// Fills in the defaults and refuses what would abort the process inside llama.cpp.
ContextParams complete(const ContextParams& wanted, const LlamaModel& model) {
  if (model.params().vocab_only) {
    throw ConfigError("the model was loaded with vocab_only, without its weights");
  }
  ContextParams params = wanted;
  const auto max_slots = static_cast<std::int32_t>(llama_max_parallel_sequences());
  require_range("the number of sequences", params.num_slots, 1, max_slots);
  require_range("n_ubatch", params.n_ubatch, 1, 1 << 20);
  require_range("n_threads", params.n_threads, 0, GGML_MAX_N_THREADS);
  require_range("n_threads_batch", params.n_threads_batch, 0, GGML_MAX_N_THREADS);
  require_range("poll", params.poll, 0, 100);
  require_range("n_ctx", params.n_ctx, 0, INT_MAX / 2);
  if (params.n_ctx == 0) params.n_ctx = model.n_ctx_train();
  if (params.n_ctx <= 0) throw ConfigError("the model does not say its context size: set n_ctx");
  if (params.n_batch == 0) params.n_batch = params.n_ubatch;
  require_range("n_batch", params.n_batch, params.n_ubatch, 1 << 24);
  // split_equal() of llama.cpp lets one sequence more than n_ubatch into a micro-batch.
  if (params.num_slots > std::min(params.n_ubatch, params.n_ctx)) {
    throw ConfigError("the number of sequences (" + std::to_string(params.num_slots) +
                      ") must not exceed n_ubatch and n_ctx: each decodes a token per step");
  }
  // output_reserve() of llama.cpp asserts both ends. Encoders and embeddings output every token.
  if (params.max_outputs == 0) params.max_outputs = params.num_slots;
  if (params.embeddings || model.memory_kind() == MemoryKind::kNone || model.has_encoder()) {
    params.max_outputs = params.n_batch;
  }
  require_range("max_outputs", params.max_outputs, params.num_slots, params.n_batch);
  if (params.n_threads == 0) params.n_threads = std::min(usable_cores(), GGML_MAX_N_THREADS);
  if (params.n_threads_batch == 0) params.n_threads_batch = params.n_threads;
  return params;
}

bool is_out_of_memory(std::string_view reason) {
  for (const std::string_view word : {"alloc", "out of memory", "reserve"}) {
    if (reason.find(word) != std::string_view::npos) return true;
  }
  return false;
}

}  // namespace

Context::Context(std::shared_ptr<const LlamaModel> model, const ContextParams& params)
    : model_(std::move(model)), params_(complete(params, *model_)) {
  try {
    create(params_);
    attach_threads();
    if (model_->uses_kernels()) {
      attention_kernels_ = use_attention_kernels(llama_get_memory(context_));
      // They compute ggml's flash attention on a CPU; without it attention is several operations.
      const bool is_on_gpu = params_.offload_kqv && model_->uses_gpu();
      uses_attention_kernels_ =
          !attention_kernels_.empty() && context_->get_cparams().flash_attn && !is_on_gpu;
    }
  } catch (...) {
    close();
    throw;
  }
}

Context::~Context() { close(); }

void Context::close() {
  attention_kernels_.clear();
  // The context waits for its last graph, which still runs on the threads.
  if (context_ != nullptr) llama_free(context_);
  if (threads_ != nullptr) ggml_threadpool_free(threads_);
  context_ = nullptr;
  threads_ = nullptr;
}

void Context::create(const ContextParams& wanted) {
  llama_context_params raw = llama_context_default_params();
  raw.n_ctx = static_cast<std::uint32_t>(wanted.n_ctx);
  raw.n_batch = static_cast<std::uint32_t>(wanted.n_batch);
  raw.n_ubatch = static_cast<std::uint32_t>(wanted.n_ubatch);
  raw.n_seq_max = static_cast<std::uint32_t>(wanted.num_slots);
  raw.n_outputs_max = static_cast<std::uint32_t>(wanted.max_outputs);
  raw.n_threads = wanted.n_threads;
  raw.n_threads_batch = wanted.n_threads_batch;
  raw.flash_attn_type = flash_attn_type(wanted.flash_attn);
  raw.pooling_type = pooling_type(wanted.pooling);
  raw.type_k = cache_type(wanted.type_k, "type_k");
  raw.type_v = cache_type(wanted.type_v, "type_v");
  raw.abort_callback = [](void* data) {
    return static_cast<std::atomic<bool>*>(data)->load(std::memory_order_relaxed);
  };
  raw.abort_callback_data = &interrupted_;
  raw.embeddings = wanted.embeddings;
  raw.offload_kqv = wanted.offload_kqv;
  raw.op_offload = wanted.op_offload;
  raw.swa_full = wanted.swa_full;
  raw.kv_unified = wanted.layout == KvLayout::kUnified;

  check_host_memory(*model_, wanted);
  const LogCapture capture;
  std::string reason;
  bool out_of_memory = false;
  try {
    context_ = llama_init_from_model(model_->handle(), raw);
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
    reason = "out of memory";
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (context_ == nullptr) {
    if (reason.empty()) reason = capture.reason();
    if (reason.empty()) reason = "llama.cpp gave no reason";
    if (out_of_memory || is_out_of_memory(reason)) {
      throw EngineError("no memory for a context of " + std::to_string(wanted.n_ctx) +
                        " cells: " + reason);
    }
    throw ConfigError("the context can't be created: " + reason);
  }

  params_.n_ctx = static_cast<std::int32_t>(llama_n_ctx(context_));
  params_.n_ubatch = static_cast<std::int32_t>(llama_n_ubatch(context_));
  cells_per_slot_ = static_cast<std::int32_t>(llama_n_ctx_seq(context_));
  has_memory_ = llama_get_memory(context_) != nullptr;
  params_.n_batch = static_cast<std::int32_t>(llama_n_batch(context_));
  params_.max_outputs = std::min(params_.max_outputs, params_.n_batch);
  if (model_->n_ctx_train() > 0 && cells_per_slot_ > model_->n_ctx_train()) {
    warnings_.push_back("a sequence may grow to " + std::to_string(cells_per_slot_) +
                        " tokens, but the model was trained with " +
                        std::to_string(model_->n_ctx_train()));
  }
}

void Context::attach_threads() {
  // Without a pool of its own, a context without OpenMP starts and joins threads for every graph.
  const int count = std::max(params_.n_threads, params_.n_threads_batch);
  ggml_threadpool_params pool = ggml_threadpool_params_default(count);
  pool.poll = static_cast<std::uint32_t>(params_.poll);
  threads_ = ggml_threadpool_new(&pool);
  if (threads_ == nullptr) {
    throw EngineError("no thread pool of " + std::to_string(count) + " threads could be started");
  }
  llama_attach_threadpool(context_, threads_, threads_);
}

ContextMemory Context::memory_usage() const {
  ContextMemory total;
  for (const auto& [type, bytes] : llama_get_memory_breakdown(context_)) {
    total.model_bytes += bytes.model;
    total.context_bytes += bytes.context;
    total.compute_bytes += bytes.compute;
  }
  return total;
}

std::int64_t Context::num_graphs_reused() const { return llama_perf_context(context_).n_reused; }

}  // namespace batchcore
