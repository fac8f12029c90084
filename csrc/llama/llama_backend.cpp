#include "llama/llama_backend.h"

#include <llama.h>

#include <algorithm>
#include <exception>
#include <new>

#include "core/errors.h"
#include "llama/attention_shape.h"
#include "llama/llama_log.h"

namespace batchcore {
namespace {

std::shared_ptr<const LlamaModel> require_generation(std::shared_ptr<const LlamaModel> model) {
  if (std::string why = model->why_no_generation(); !why.empty()) {
    throw ConfigError("can't generate with this model: " + why);
  }
  return model;
}

// Several micro-batches in one call would only hide the first one's results until the last is done.
ContextParams one_micro_batch_per_call(ContextParams params) {
  params.n_batch = params.n_ubatch;
  params.embeddings = false;
  return params;
}

// batchcore's kernels take any number of rows; ggml's take fours (docs/design.md), and a GPU may.
std::int32_t row_group(const LlamaModel& model) {
  return model.uses_kernels() && !model.uses_gpu() ? 1 : BackendInfo{}.row_group;
}

// ggml's flash attention on a CPU goes row by row over the cells that the row attends to, and from
// 64 rows on over tiles of rows, each with the cells that any of its rows attends to
// (ggml-cpu/ops.cpp, ggml_fa_tile_config). It has tiles for caches that are not quantised.
// batchcore's attention takes tiles of one sequence.
std::int32_t attention_tile(const LlamaModel& model, const Context& context) {
  constexpr std::int32_t kTileRows = 64;
  if (context.uses_attention_kernels()) return 0;
  const ContextParams& params = context.params();
  const bool has_tiles =
      params.type_k == params.type_v && (params.type_k == "f16" || params.type_k == "f32");
  const bool is_flash = params.flash_attn != FlashAttention::kOff;
  const bool is_on_gpu = params.offload_kqv && model.uses_gpu();
  return has_tiles && is_flash && !is_on_gpu ? kTileRows : 0;
}

}  // namespace

void LlamaBackend::BatchDeleter::operator()(llama_batch_ext* batch) const {
  llama_batch_ext_free(batch);
}

LlamaBackend::LlamaBackend(std::shared_ptr<const LlamaModel> model, const ContextParams& params)
    : model_(require_generation(std::move(model))), params_(one_micro_batch_per_call(params)) {
  create();
  const ContextParams& effective = context_->params();
  info_ = {
      .n_vocab = model_->n_vocab(),
      .num_slots = effective.num_slots,
      .num_cells = effective.n_ctx,
      .cells_per_slot = context_->cells_per_slot(),
      .n_ubatch = effective.n_ubatch,
      .max_outputs = effective.max_outputs,
      .window = model_->n_swa(),  // full-size windows too reuse cells that are masked
      .row_group = row_group(*model_),
      .attention_tile = attention_tile(*model_, *context_),
      .layout = effective.layout,
      .memory = model_->memory_kind(),
  };
  if (!model_->uses_kernels() || model_->uses_gpu()) variant_operations_ = kernels::kGgmlKernels;
  next_position_.assign(static_cast<std::size_t>(info_.num_slots), -1);
}

void LlamaBackend::create() {
  context_ = std::make_unique<Context>(model_, params_);
  memory_ = llama_get_memory(context_->get());
  if (memory_ == nullptr) {
    throw ConfigError("can't generate with this model: llama.cpp keeps no memory for it");
  }
  batch_.reset(llama_batch_ext_init(context_->get()));
}

bool LlamaBackend::rebuild() {
  const std::lock_guard lock(context_mutex_);
  batch_.reset();
  memory_ = nullptr;
  context_.reset();  // first: there may be no room for two
  pending_copies_.clear();
  has_logits_.clear();
  create();  // where it throws, this backend holds nothing and fails every decode
  return true;
}

void LlamaBackend::interrupt() {
  const std::lock_guard lock(context_mutex_);
  if (context_ != nullptr) context_->interrupt();
}

LlamaBackend::~LlamaBackend() = default;

DecodeStatus LlamaBackend::decode(const MicroBatch& batch) {
  has_logits_.clear();
  if (memory_ == nullptr) {
    last_error_ = "the context was lost";
    return DecodeStatus::kComputeFailed;
  }
  last_error_ = why_invalid(batch);
  if (!last_error_.empty()) return DecodeStatus::kInvalidBatch;
  if (!fill(batch)) {
    last_error_ = "llama.cpp did not take the batch";
    return DecodeStatus::kInvalidBatch;
  }

  const LogCapture capture;
  const kernels::VariantWatch watch(variant_operations_);
  std::int32_t code = 0;
  try {
    code = llama_process(context_->get(), LLAMA_PROCESS_TYPE_DECODE, batch_.get());
  } catch (const std::bad_alloc&) {
    last_error_ = "out of memory";
    code = -2;
  } catch (const std::exception& error) {
    // Graph reservation and pending copies throw; what they could not get is memory.
    last_error_ = error.what();
    code = last_error_.find("alloc") != std::string::npos ? -2 : -3;
  }
  // Interrupts count for the call they reach. Any outcome but -1 has carried out pending copies.
  context_->clear_interrupt();
  if (code != -1) pending_copies_.clear();
  if (code == 0) {
    has_logits_.assign(batch.outputs.begin(), batch.outputs.end());
    return DecodeStatus::kOk;
  }
  if (last_error_.empty()) last_error_ = capture.reason();
  switch (code) {
    case 1:
      return DecodeStatus::kNoSlot;
    case 2:
      return DecodeStatus::kInterrupted;
    case -1:
      return DecodeStatus::kInvalidBatch;
    case -2:
      return DecodeStatus::kAllocFailed;
    default:
      return DecodeStatus::kComputeFailed;
  }
}

// llama.cpp asserts some of this, and its answer to the rest is a log line.
std::string LlamaBackend::why_invalid(const MicroBatch& batch) {
  const std::size_t size = batch.size();
  if (size == 0) return "the batch is empty";
  if (size > static_cast<std::size_t>(info_.n_ubatch)) {
    return "the batch has " + std::to_string(size) + " tokens, more than n_ubatch (" +
           std::to_string(info_.n_ubatch) + ")";
  }
  if (batch.positions.size() != size || batch.seq_ids.size() != size ||
      batch.outputs.size() != size) {
    return "the arrays of the batch differ in length";
  }
  const auto outputs = std::count_if(batch.outputs.begin(), batch.outputs.end(),
                                     [](std::uint8_t output) { return output != 0; });
  if (outputs > info_.max_outputs) {
    return "the batch asks for " + std::to_string(outputs) +
           " rows of logits, more than max_outputs (" + std::to_string(info_.max_outputs) + ")";
  }
  const Position limit = context_->model().position_limit();
  std::fill(next_position_.begin(), next_position_.end(), -1);
  for (std::size_t i = 0; i < size; ++i) {
    const SeqId seq_id = batch.seq_ids[i];
    if (!in_range(seq_id)) return "there is no sequence " + std::to_string(seq_id);
    if (batch.tokens[i] < 0 || batch.tokens[i] >= info_.n_vocab) {
      return "there is no token " + std::to_string(batch.tokens[i]);
    }
    Position& next = next_position_[static_cast<std::size_t>(seq_id)];
    if (next < 0) next = pos_max(seq_id) + 1;
    if (batch.positions[i] != next) {
      return "sequence " + std::to_string(seq_id) + " must go on at position " +
             std::to_string(next) + ", not " + std::to_string(batch.positions[i]);
    }
    if (next >= limit) {
      return "the model knows no position " + std::to_string(next);
    }
    ++next;
  }
  return {};
}

bool LlamaBackend::fill(const MicroBatch& batch) {
  llama_batch_ext_clear(batch_.get());
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const std::int32_t index =
        llama_batch_ext_add_token(batch_.get(), batch.seq_ids[i], batch.tokens[i]);
    if (index < 0 || !llama_batch_ext_set_pos(batch_.get(), index, &batch.positions[i]) ||
        !llama_batch_ext_set_output_logits(batch_.get(), index, batch.outputs[i] != 0)) {
      return false;
    }
  }
  return true;
}

const float* LlamaBackend::logits(std::int32_t index) {
  const auto row = static_cast<std::size_t>(index);
  if (index < 0 || row >= has_logits_.size() || has_logits_[row] == 0) return nullptr;
  return llama_get_logits_ith(context_->get(), index);  // waits for the device
}

AttentionShape LlamaBackend::attention_shape(const MicroBatch& batch) const {
  return batchcore::attention_shape(memory_, batch, info_.window,
                                    context_->uses_attention_kernels());
}

Position LlamaBackend::pos_min(SeqId seq_id) const {
  return in_range(seq_id) ? llama_memory_seq_pos_min(memory_, seq_id) : -1;
}

Position LlamaBackend::pos_max(SeqId seq_id) const {
  return in_range(seq_id) ? llama_memory_seq_pos_max(memory_, seq_id) : -1;
}

}  // namespace batchcore
