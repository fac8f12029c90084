// llama.cpp's context for people who drive it themselves (batchcore.lowlevel): the same operations,
// but misuse throws where llama.cpp would abort the process or compute nonsense. Any thread may
// call, one at a time: a second one gets an EngineError instead of a data race.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/types.h"
#include "llama/context.h"
#include "llama/token_batch.h"

struct llama_memory_i;

namespace batchcore {

/// Rows of floats inside llama.cpp's output buffer, valid until the next decode or encode.
struct ResultRows {
  const float* data = nullptr;
  std::int64_t num_rows = 0;
  std::int64_t num_columns = 0;
  std::int64_t generation = 0;  ///< of the context when they were computed
};

class LowLevelContext {
 public:
  LowLevelContext(std::shared_ptr<const LlamaModel> model, const ContextParams& params);

  /// Frees everything but this object. Idempotent; after it, every other call is EngineClosedError.
  void close();
  [[nodiscard]] bool is_closed() const { return closed_; }

  [[nodiscard]] const ContextParams& params() const { return context_.params(); }
  [[nodiscard]] std::int32_t cells_per_sequence() const { return context_.cells_per_slot(); }
  [[nodiscard]] const std::vector<std::string>& warnings() const { return context_.warnings(); }
  [[nodiscard]] ContextMemory memory_usage();
  [[nodiscard]] std::int64_t num_graphs_reused();

  /// Throws InvalidRequestError for a batch that llama.cpp can't take, ViewInUseError where an
  /// array over the last result lives, DecodeError for what llama.cpp answers.
  void decode(const TokenBatch& batch);
  void encode(const TokenBatch& batch);

  /// Makes a decode in progress return with status 2; see Context::interrupt(). Any time.
  void interrupt() { context_.interrupt(); }

  /// Result of token `index` of the last batch (negative counts from its end), which must have
  /// asked for it. Throws InvalidRequestError where there is none.
  [[nodiscard]] ResultRows logits(std::int64_t index);
  [[nodiscard]] ResultRows embeddings(std::int64_t index);
  /// All rows that were asked for, in the order of the batch.
  [[nodiscard]] ResultRows all_logits();
  [[nodiscard]] ResultRows all_embeddings();
  /// The pooled embedding of a sequence of the last batch.
  [[nodiscard]] ResultRows sequence_embedding(SeqId seq_id);

  bool seq_rm(SeqId seq_id, Position begin, Position end);
  void seq_cp(SeqId from, SeqId to, Position begin, Position end);
  void seq_keep(SeqId seq_id);
  [[nodiscard]] Position seq_pos_min(SeqId seq_id);
  [[nodiscard]] Position seq_pos_max(SeqId seq_id);
  void clear();

  /// A sequence's state as bytes, checked at restore to be whole and of an equal context.
  [[nodiscard]] std::string state_save(SeqId seq_id);
  void state_restore(SeqId seq_id, std::span<const std::uint8_t> bytes);

  /// Throws where results of a generation must not be read now: StaleViewError, EngineClosedError,
  /// EngineError. Generations count the calls of decode and encode.
  void check_readable(std::int64_t generation) const;

  /// How many arrays point into the output buffer. While there are any, decode and close refuse.
  void borrow() { ++num_borrowed_; }
  void give_back() { --num_borrowed_; }

 private:
  // Marks the context as in use by this thread; throws where it is already, or is closed.
  class Use {
   public:
    explicit Use(LowLevelContext& context);
    ~Use() { context_.in_use_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    LowLevelContext& context_;
  };

  void run(const TokenBatch& batch, bool encode);
  void check_batch(const TokenBatch& batch, bool encode) const;
  void check_positions(const TokenBatch& batch) const;
  void check_sequence(SeqId seq_id) const;
  [[nodiscard]] std::size_t find_row(std::int64_t index) const;
  [[nodiscard]] std::uint64_t fingerprint() const;

  Context context_;
  llama_memory_i* memory_ = nullptr;
  std::vector<std::uint8_t> has_output_;                 // per token of the last batch
  std::vector<std::pair<SeqId, SeqId>> pending_copies_;  // between streams, see LlamaBackend
  bool encoded_ = false;
  std::atomic<bool> in_use_{false};
  std::atomic<bool> closed_{false};
  std::atomic<std::int64_t> generation_{0};
  std::atomic<std::int64_t> num_borrowed_{0};
};

}  // namespace batchcore
