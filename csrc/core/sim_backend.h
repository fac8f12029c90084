// A backend without a model, for tests and scale studies: it keeps every cell as llama.cpp would,
// answers with logits that depend on the exact tokens of the sequence (so any mix-up of cells
// changes the output), and charges time by a cost model on a virtual clock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/backend.h"

namespace batchcore {

/// Seconds that a micro-batch takes.
struct SimCost {
  double base_s = 10e-3;
  double prefill_token_s = 1e-3;
  double decode_row_s = 3e-3;
  double kv_token_s = 0.0;   ///< per KV token that a row attends to
  double loose_row_s = 0.0;  ///< more for each row beyond a multiple of BackendInfo::row_group
  /// Per KV token that is copied to or from host memory; no part of a micro-batch.
  double copied_token_s = 0.0;
};

class SimBackend : public Backend {
 public:
  /// Rows of logits have `num_logits` tokens, as many as the engine's Vocab: with fewer than
  /// info.n_vocab (0 = as many) prompts may be of any token, and sampling costs next to nothing.
  SimBackend(const BackendInfo& info, const SimCost& cost, std::int32_t num_logits = 0);

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
  void interrupt() override { interrupted_ = true; }

  /// Seconds of virtual time since the start.
  [[nodiscard]] double now() const { return now_; }
  /// Lets virtual time pass, for idle spells.
  void advance_to(double time) {
    if (time > now_) now_ = time;
  }
  /// Distinct cells in use.
  [[nodiscard]] std::int32_t num_cells_used() const {
    return static_cast<std::int32_t>(holders_.size() - free_cells_.size());
  }

 private:
  struct Cell {
    std::uint64_t prefix;  // hash of the tokens up to and including this one
    std::uint32_t id;      // cells with the same id are the same memory
  };

  [[nodiscard]] bool is_valid(const MicroBatch& batch);
  [[nodiscard]] bool has_room_for(std::size_t count) const {
    return info_.layout == KvLayout::kStreams ||
           num_cells_used() + static_cast<std::int64_t>(count) <= info_.num_cells;
  }
  [[nodiscard]] bool is_whole_only() const {
    return info_.memory == MemoryKind::kRecurrent || info_.memory == MemoryKind::kHybrid;
  }
  std::vector<Cell>& cells(SeqId seq_id) { return sequences_[static_cast<std::size_t>(seq_id)]; }
  void push_cell(SeqId seq_id, std::uint64_t prefix);
  void release(const Cell& cell);
  void let_pass(double seconds) { now_ = now_ + seconds; }  // one writer: the engine thread

  BackendInfo info_;
  SimCost cost_;
  std::size_t num_logits_;
  std::vector<std::vector<Cell>> sequences_;
  std::vector<std::int32_t> holders_;      // sequences that hold a cell, by its id
  std::vector<std::uint32_t> free_cells_;  // ids that nobody holds
  std::vector<Position> next_;             // scratch of is_valid(), by sequence
  std::vector<std::int32_t> row_of_index_;
  std::vector<float> logits_;
  std::atomic<double> now_{0.0};  // the clock of callers' threads too
  std::atomic<bool> interrupted_{false};
};

}  // namespace batchcore
