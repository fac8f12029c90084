// A backend without a model, for tests and scale studies: it keeps every cell as llama.cpp would,
// answers with logits that depend on the exact tokens of the sequence (so any mix-up of cells
// changes the output), and charges time by a cost model on a virtual clock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/backend.h"

namespace batchcore {

/// Seconds that a micro-batch takes.
struct SimCost {
  double base_s = 10e-3;
  double prefill_token_s = 1e-3;
  double decode_row_s = 3e-3;
  double kv_token_s = 0.0;   ///< per KV token that a row attends to
  double loose_row_s = 0.0;  ///< more for each row beyond a multiple of four
};

class SimBackend : public Backend {
 public:
  SimBackend(const BackendInfo& info, const SimCost& cost);

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
    return static_cast<std::int32_t>(holders_.size());
  }

 private:
  struct Cell {
    std::uint64_t id;      // cells with the same id are the same memory
    std::uint64_t prefix;  // hash of the tokens up to and including this one
  };

  [[nodiscard]] bool is_valid(const MicroBatch& batch) const;
  [[nodiscard]] bool is_whole_only() const {
    return info_.memory == MemoryKind::kRecurrent || info_.memory == MemoryKind::kHybrid;
  }
  std::vector<Cell>& cells(SeqId seq_id) { return sequences_[static_cast<std::size_t>(seq_id)]; }
  void push_cell(SeqId seq_id, std::uint64_t prefix);
  void release(const Cell& cell);

  BackendInfo info_;
  SimCost cost_;
  std::vector<std::vector<Cell>> sequences_;
  std::unordered_map<std::uint64_t, std::int32_t> holders_;  // sequences that hold a cell
  std::uint64_t next_cell_ = 0;
  std::vector<std::int32_t> row_of_index_;
  std::vector<float> logits_;
  std::atomic<double> now_{0.0};  // the clock of callers' threads too
  std::atomic<bool> interrupted_{false};
};

}  // namespace batchcore
