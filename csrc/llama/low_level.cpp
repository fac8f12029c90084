#include "llama/low_level.h"

#include <llama.h>

#include <algorithm>
#include <exception>
#include <map>
#include <new>

#include "core/errors.h"
#include "llama/llama_log.h"

namespace batchcore {
namespace {

constexpr Position kMaxPosition = 1 << 30;  // far from where llama.cpp's differences overflow

struct BatchDeleter {
  void operator()(llama_batch_ext* batch) const { llama_batch_ext_free(batch); }
};
using BatchHandle = std::unique_ptr<llama_batch_ext, BatchDeleter>;

BatchHandle make_batch(llama_context* context, const TokenBatch& batch, bool all_outputs) {
  BatchHandle result(llama_batch_ext_init(context));
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const std::span<const SeqId> sequences = batch.sequences(i);
    const std::int32_t index =
        llama_batch_ext_add_token(result.get(), sequences.front(), batch.tokens[i]);
    bool taken = index >= 0 && llama_batch_ext_set_pos(result.get(), index, &batch.positions[i]) &&
                 llama_batch_ext_set_output_logits(result.get(), index,
                                                   all_outputs || batch.outputs[i] != 0);
    for (const SeqId seq_id : sequences.subspan(1)) {
      taken = taken && llama_batch_ext_add_seq(result.get(), index, seq_id);
    }
    if (!taken) throw InvalidRequestError("llama.cpp did not take token " + std::to_string(i));
  }
  return result;
}

}  // namespace

LowLevelContext::Use::Use(LowLevelContext& context) : context_(context) {
  if (context_.in_use_.exchange(true)) {
    throw EngineError("another thread is using this context");
  }
  if (context_.closed_) {
    context_.in_use_ = false;
    throw EngineClosedError("the context is closed");
  }
}

LowLevelContext::LowLevelContext(std::shared_ptr<const LlamaModel> model,
                                 const ContextParams& params)
    : context_(std::move(model), params), memory_(llama_get_memory(context_.get())) {}

void LowLevelContext::close() {
  if (closed_) return;
  const Use use(*this);
  if (num_borrowed_ > 0) {
    throw ViewInUseError("arrays over the last result are alive: delete or copy them first");
  }
  closed_ = true;
  context_.close();
}

void LowLevelContext::check_readable(std::int64_t generation) const {
  if (closed_) throw EngineClosedError("the context is closed");
  if (generation != generation_) {
    throw StaleViewError("this view is older than the context's last decode: copy what must last");
  }
  if (in_use_) throw EngineError("another thread is using this context");
}

ContextMemory LowLevelContext::memory_usage() {
  const Use use(*this);
  return context_.memory_usage();
}

std::int64_t LowLevelContext::num_graphs_reused() {
  const Use use(*this);
  return context_.num_graphs_reused();
}

void LowLevelContext::decode(const TokenBatch& batch) { run(batch, false); }

void LowLevelContext::encode(const TokenBatch& batch) { run(batch, true); }

void LowLevelContext::run(const TokenBatch& batch, bool encode) {
  const Use use(*this);
  check_batch(batch, encode);
  if (num_borrowed_ > 0) {
    throw ViewInUseError("arrays over the last result are alive: delete or copy them first");
  }
  ++generation_;
  has_output_.clear();
  const bool all_outputs = encode || params().embeddings;
  const BatchHandle handle = make_batch(context_.get(), batch, all_outputs);
  const LogCapture capture;
  std::int32_t code = 0;
  std::string reason;
  try {
    code =
        llama_process(context_.get(),
                      encode ? LLAMA_PROCESS_TYPE_ENCODE : LLAMA_PROCESS_TYPE_DECODE, handle.get());
  } catch (const std::bad_alloc&) {
    code = -2;
    reason = "out of memory";
  } catch (const std::exception& error) {
    code = -3;
    reason = error.what();
  }
  context_.clear_interrupt();
  if (code != -1) pending_copies_.clear();
  if (code != 0) {
    if (reason.empty()) reason = capture.reason();
    static const std::map<int, std::string> meanings = {{1, "no room in the KV cells"},
                                                        {2, "interrupted"},
                                                        {-1, "invalid batch"},
                                                        {-2, "no memory for the computation"},
                                                        {-3, "the computation failed"}};
    const auto meaning = meanings.find(code);
    throw DecodeError((meaning == meanings.end() ? "llama.cpp failed" : meaning->second) +
                          (reason.empty() ? "" : ": " + reason),
                      code);
  }
  if (encode) encoded_ = true;
  has_output_ = batch.outputs;
  if (all_outputs) std::fill(has_output_.begin(), has_output_.end(), std::uint8_t{1});
}

void LowLevelContext::check_batch(const TokenBatch& batch, bool encode) const {
  const LlamaModel& model = context_.model();
  if (encode && memory_ != nullptr && !model.has_encoder()) {
    throw InvalidRequestError("this model has no encoder: use decode()");
  }
  if (!encode && memory_ == nullptr) {
    throw InvalidRequestError("this model is an encoder: use encode()");
  }
  if (!encode && model.has_encoder() && !encoded_) {
    throw InvalidRequestError("this model has an encoder: encode() its input first");
  }
  const auto size = static_cast<std::int64_t>(batch.size());
  if (size == 0) throw InvalidRequestError("the batch is empty");
  const bool at_once = encode || !llama_get_causal_attn(context_.get()) ||
                       llama_pooling_type(context_.get()) > LLAMA_POOLING_TYPE_NONE;
  const std::int64_t limit = at_once ? params().n_ubatch : params().n_batch;
  if (size > limit) {
    throw InvalidRequestError("the batch has " + std::to_string(size) + " tokens, more than " +
                              (at_once ? "n_ubatch (" : "n_batch (") + std::to_string(limit) + ")");
  }
  const auto outputs =
      std::count_if(batch.outputs.begin(), batch.outputs.end(), [](auto o) { return o != 0; });
  if (outputs > params().max_outputs) {
    throw InvalidRequestError("the batch asks for " + std::to_string(outputs) +
                              " rows of logits, more than n_outputs_max (" +
                              std::to_string(params().max_outputs) + ")");
  }
  for (std::size_t i = 0; i < batch.size(); ++i) {
    if (batch.tokens[i] < 0 || batch.tokens[i] >= model.n_vocab()) {
      throw InvalidRequestError("token " + std::to_string(batch.tokens[i]) +
                                " is not in the vocabulary of " + std::to_string(model.n_vocab()) +
                                " tokens");
    }
    const std::span<const SeqId> sequences = batch.sequences(i);
    if (sequences.empty()) throw InvalidRequestError("a token must belong to a sequence");
    for (const SeqId seq_id : sequences) check_sequence(seq_id);
    if (sequences.size() > 1 && memory_ != nullptr &&
        (params().layout == KvLayout::kStreams || model.is_recurrent() || model.is_hybrid())) {
      throw InvalidRequestError(
          "a token can only belong to several sequences in a unified attention cache");
    }
  }
  check_positions(batch);
}

// llama.cpp refuses gaps with a log line; repeated positions it takes, and answers with nonsense.
void LowLevelContext::check_positions(const TokenBatch& batch) const {
  const Position limit = std::min(context_.model().position_limit(), kMaxPosition);
  std::map<SeqId, Position> next;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const Position position = batch.positions[i];
    if (position < 0 || position >= limit) {
      throw InvalidRequestError("position " + std::to_string(position) + " is out of range");
    }
    for (const SeqId seq_id : batch.sequences(i)) {
      auto [entry, is_new] = next.try_emplace(seq_id, position);
      if (is_new) {
        const Position held = llama_memory_seq_pos_max(memory_, seq_id);
        if (held >= 0) entry->second = held + 1;
      }
      if (position != entry->second) {
        throw InvalidRequestError("sequence " + std::to_string(seq_id) +
                                  " must go on at position " + std::to_string(entry->second) +
                                  ", not " + std::to_string(position));
      }
      ++entry->second;
    }
  }
}

std::size_t LowLevelContext::find_row(std::int64_t index) const {
  const auto size = static_cast<std::int64_t>(has_output_.size());
  const std::int64_t row = index < 0 ? index + size : index;
  if (row < 0 || row >= size) {
    throw InvalidRequestError("the last batch has no token " + std::to_string(index));
  }
  if (has_output_[static_cast<std::size_t>(row)] == 0) {
    throw InvalidRequestError("token " + std::to_string(index) +
                              " of the last batch did not ask for an output");
  }
  return static_cast<std::size_t>(row);
}

ResultRows LowLevelContext::logits(std::int64_t index) {
  const Use use(*this);
  if (memory_ == nullptr) throw InvalidRequestError("an encoder has no logits");
  const auto row = static_cast<std::int32_t>(find_row(index));
  return {llama_get_logits_ith(context_.get(), row), 1, context_.model().n_vocab(), generation_};
}

ResultRows LowLevelContext::all_logits() {
  const Use use(*this);
  if (memory_ == nullptr) throw InvalidRequestError("an encoder has no logits");
  const auto rows = std::count(has_output_.begin(), has_output_.end(), 1);
  if (rows == 0) throw InvalidRequestError("there is no batch with outputs to read from");
  return {llama_get_logits(context_.get()), rows, context_.model().n_vocab(), generation_};
}

ResultRows LowLevelContext::embeddings(std::int64_t index) {
  const Use use(*this);
  if (!params().embeddings) throw InvalidRequestError("create the context with embeddings=True");
  if (llama_pooling_type(context_.get()) != LLAMA_POOLING_TYPE_NONE) {
    throw InvalidRequestError("this context pools: use sequence_embedding()");
  }
  const auto row = static_cast<std::int32_t>(find_row(index));
  return {llama_get_embeddings_ith(context_.get(), row), 1, context_.model().n_embd_out(),
          generation_};
}

ResultRows LowLevelContext::all_embeddings() {
  const auto rows = static_cast<std::int64_t>(has_output_.size());
  if (rows == 0) throw InvalidRequestError("there is no batch to read from");
  ResultRows first = embeddings(0);  // embeddings make every token an output
  first.num_rows = rows;
  return first;
}

ResultRows LowLevelContext::sequence_embedding(SeqId seq_id) {
  const Use use(*this);
  check_sequence(seq_id);
  if (!params().embeddings) throw InvalidRequestError("create the context with embeddings=True");
  llama_synchronize(context_.get());
  const float* data = llama_get_embeddings_seq(context_.get(), seq_id);
  if (has_output_.empty() || data == nullptr) {
    throw InvalidRequestError("the last batch made no pooled embedding of sequence " +
                              std::to_string(seq_id));
  }
  const bool ranks = llama_pooling_type(context_.get()) == LLAMA_POOLING_TYPE_RANK;
  const LlamaModel& model = context_.model();
  const auto columns =
      ranks ? static_cast<std::int64_t>(llama_model_n_cls_out(model.handle())) : model.n_embd_out();
  return {data, 1, columns, generation_};
}

}  // namespace batchcore
