// Backend over llama.cpp. Everything that would make llama.cpp abort the process is checked here
// first; everything it throws is caught here. Owned by one engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "llama/context.h"

struct llama_batch_ext;
struct llama_memory_i;

namespace batchcore {

class LlamaBackend final : public Backend {
 public:
  /// Throws ConfigError where the model can't generate or the parameters can't work, EngineError
  /// where memory runs out.
  LlamaBackend(std::shared_ptr<const LlamaModel> model, const ContextParams& params);
  ~LlamaBackend() override;

  [[nodiscard]] const BackendInfo& info() const override { return info_; }
  DecodeStatus decode(const MicroBatch& batch) override;
  [[nodiscard]] const float* logits(std::int32_t index) override;
  [[nodiscard]] AttentionShape attention_shape(const MicroBatch& batch) const override;
  bool remove(SeqId seq_id, Position begin, Position end) override;
  bool copy(SeqId from, SeqId to, Position end) override;
  [[nodiscard]] Position pos_min(SeqId seq_id) const override;
  [[nodiscard]] Position pos_max(SeqId seq_id) const override;
  [[nodiscard]] std::size_t saved_size(SeqId seq_id) override;
  std::size_t save(SeqId seq_id, std::span<std::uint8_t> into) override;
  bool restore(SeqId seq_id, std::span<const std::uint8_t> from) override;

  /// Sticks until a decode() has seen it, so that one sent between two calls is not lost.
  void interrupt() override;

  /// A new context with the same parameters.
  bool rebuild() override;

  [[nodiscard]] std::string last_error() const override { return last_error_; }
  [[nodiscard]] std::int64_t num_graphs_reused() const override {
    return context_ == nullptr ? 0 : context_->num_graphs_reused();
  }

  [[nodiscard]] std::uint32_t variant_operations() const override { return variant_operations_; }

  /// The context beneath: effective parameters, warnings, memory and graph figures.
  [[nodiscard]] const Context& context() const { return *context_; }

 private:
  void create();
  [[nodiscard]] bool in_range(SeqId seq_id) const {
    return seq_id >= 0 && seq_id < info_.num_slots;
  }
  [[nodiscard]] std::string why_invalid(const MicroBatch& batch);
  [[nodiscard]] bool fill(const MicroBatch& batch);
  [[nodiscard]] bool window_allows(Position held_from, Position end) const;
  [[nodiscard]] bool copy_pending(SeqId seq_id) const;
  bool copy_cells(SeqId from, SeqId to);
  bool copy_state(SeqId from, SeqId to);
  void forget(SeqId seq_id);

  const std::shared_ptr<const LlamaModel> model_;
  const ContextParams params_;
  std::mutex context_mutex_;  // between rebuild() and interrupt(), which may come from any thread
  std::unique_ptr<Context> context_;
  BackendInfo info_;
  llama_memory_i* memory_ = nullptr;
  struct BatchDeleter {
    void operator()(llama_batch_ext* batch) const;
  };
  std::unique_ptr<llama_batch_ext, BatchDeleter> batch_;
  std::vector<std::uint8_t> has_logits_;  // per row of the last batch
  std::vector<Position> next_position_;   // scratch of why_invalid(), per sequence; -1 = not seen
  // Copies between streams that llama.cpp carries out at the start of the next decode.
  std::vector<std::pair<SeqId, SeqId>> pending_copies_;
  std::vector<std::uint8_t> state_;  // scratch of copy_state()
  std::uint32_t variant_operations_ = 0;
  std::string last_error_;
};

}  // namespace batchcore
