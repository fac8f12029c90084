// The only seam to a model. LlamaBackend drives llama.cpp; SimBackend is a cost model for tests and
// scale studies. Owned by one engine; every method but interrupt() belongs to the engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/micro_batch.h"
#include "core/types.h"

namespace batchcore {

/// What a backend was built with; constant over its life.
struct BackendInfo {
  std::int32_t n_vocab = 0;
  std::int32_t num_slots = 0;       ///< sequences that can hold state at the same time
  std::int32_t num_cells = 0;       ///< KV cells in all
  std::int32_t cells_per_slot = 0;  ///< the longest sequence, in tokens
  std::int32_t n_ubatch = 0;        ///< tokens of one decode call at most
  std::int32_t max_outputs = 0;     ///< rows with logits of one decode call at most
  std::int32_t window = 0;  ///< positions that a sliding-window memory surely keeps, 0 = all
  /// Rows that the kernels take together: those beyond a multiple of it may cost as much as a whole
  /// group. 1 = any number of rows costs what it should.
  std::int32_t row_group = 4;
  /// Unified: from this many rows on, a call computes attention between all of its sequences, as if
  /// they were one; 0 = never.
  std::int32_t attention_tile = 0;
  KvLayout layout = KvLayout::kUnified;
  MemoryKind memory = MemoryKind::kAttention;
};

/// The least multiple of `group` that is not below `count`.
[[nodiscard]] constexpr std::int32_t next_multiple(std::int32_t count, std::int32_t group) {
  return (count + group - 1) / group * group;
}

/// What attention goes over in a decode call: key positions, summed over the layers that have any.
struct AttentionShape {
  std::int32_t num_full_layers = 0;
  std::int32_t num_window_layers = 0;
  std::int32_t window = 0;
  std::int64_t computed_per_row = 0;  ///< with other sequences' cells, holes and padding
  /// If not 0, computed_per_row says nothing: a row goes over positions of its own sequence only,
  /// in blocks of so many. (Rows that are computed together may go over one more at either end.)
  std::int32_t block = 0;

  /// Those that a token at `position` attends to.
  [[nodiscard]] std::int64_t needed(Position position) const {
    const std::int64_t all = position + 1;
    const std::int64_t last = all < window ? all : window;
    return num_full_layers * all + num_window_layers * last;
  }
  /// Those that attention goes over for it.
  [[nodiscard]] std::int64_t computed(Position position) const {
    if (block == 0) return computed_per_row;
    const std::int64_t end = next_multiple(position + 1, block);
    const std::int64_t begin = position < window ? 0 : (position + 1 - window) / block * block;
    return num_full_layers * end + num_window_layers * (end - begin);
  }
};

/// Outcome of decode(), with llama.cpp's return code as value.
enum class DecodeStatus {
  kOk = 0,
  kNoSlot = 1,          ///< no room in the KV memory, nothing changed
  kInterrupted = 2,     ///< interrupt() was seen; memory holds a prefix of the batch
  kInvalidBatch = -1,   ///< rejected before any work, nothing changed
  kAllocFailed = -2,    ///< no memory for the computation; KV memory may hold a prefix of the batch
  kComputeFailed = -3,  ///< the device failed; the context is suspect
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual const BackendInfo& info() const = 0;

  /// Runs one micro-batch. Never throws for what a model or device does; a batch that would make
  /// llama.cpp abort the process is answered with kInvalidBatch.
  virtual DecodeStatus decode(const MicroBatch& batch) = 0;

  /// Logits (n_vocab floats) of row `index` of the last batch, which must have asked for output.
  /// Valid until the next decode(). Nullptr where there are none.
  [[nodiscard]] virtual const float* logits(std::int32_t index) = 0;

  /// Of the last decode(), which was this batch. All zero where there is no attention.
  [[nodiscard]] virtual AttentionShape attention_shape(const MicroBatch& batch) const = 0;

  /// Forgets positions [begin, end) of a sequence; end < 0 means all from begin. False where this
  /// memory can't forget just that part (recurrent); forgetting a whole sequence always succeeds.
  virtual bool remove(SeqId seq_id, Position begin, Position end) = 0;

  /// Makes `to` (empty) hold positions [0, end) of `from`; end < 0 means all of it. In kUnified the
  /// cells are shared. False (and `to` empty) where this memory has no such state any more: a
  /// recurrent state at another position, a window that has moved past `end`.
  virtual bool copy(SeqId from, SeqId to, Position end) = 0;

  /// First and last position that is held for a sequence, -1 where it is empty.
  [[nodiscard]] virtual Position pos_min(SeqId seq_id) const = 0;
  [[nodiscard]] virtual Position pos_max(SeqId seq_id) const = 0;

  /// Bytes of host memory that save() needs for a sequence.
  [[nodiscard]] virtual std::size_t saved_size(SeqId seq_id) = 0;

  /// Copies a sequence's state into host memory; returns the bytes written, 0 on failure.
  virtual std::size_t save(SeqId seq_id, std::span<std::uint8_t> into) = 0;

  /// Restores what save() wrote into an empty sequence. On failure the sequence is empty again.
  virtual bool restore(SeqId seq_id, std::span<const std::uint8_t> from) = 0;

  /// Asks a running decode() to return early with kInterrupted, where the device can. Any thread.
  virtual void interrupt() = 0;

  /// Sets everything up anew after the device failed; what every sequence held is lost. False where
  /// that is of no use. Throws EngineError where it can't be had.
  virtual bool rebuild() { return false; }

  /// Why the last decode() did not return kOk, in words; empty where there is nothing to add.
  [[nodiscard]] virtual std::string last_error() const { return {}; }

  /// What in the calls so far can make a row's results depend on the other rows, as a mask of
  /// kernels::VariantOperation.
  [[nodiscard]] virtual std::uint32_t variant_operations() const { return 0; }

  /// Decode calls that reused the compute graph of the one before.
  [[nodiscard]] virtual std::int64_t num_graphs_reused() const { return 0; }
};

}  // namespace batchcore
