// The tokens of one decode call. Filled by the engine from a StepPlan, read by a Backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/types.h"

namespace batchcore {

/// Parallel arrays, one entry per token; tokens of a sequence are adjacent and ascending in
/// position.
struct MicroBatch {
  std::vector<Token> tokens;
  std::vector<Position> positions;
  std::vector<SeqId> seq_ids;
  std::vector<std::uint8_t> outputs;  ///< 1 where the logits of the row are wanted
  std::int32_t num_outputs = 0;

  void add(Token token, Position position, SeqId seq_id, bool output) {
    tokens.push_back(token);
    positions.push_back(position);
    seq_ids.push_back(seq_id);
    outputs.push_back(output ? 1 : 0);
    num_outputs += output ? 1 : 0;
  }
  /// Asks for the logits of `count` more rows, whichever.
  void add_outputs(std::int32_t count) {
    for (std::size_t i = 0; i < outputs.size() && count > 0; ++i) {
      if (outputs[i] != 0) continue;
      outputs[i] = 1;
      num_outputs += 1;
      count -= 1;
    }
  }
  void clear() {
    tokens.clear();
    positions.clear();
    seq_ids.clear();
    outputs.clear();
    num_outputs = 0;
  }
  [[nodiscard]] std::size_t size() const { return tokens.size(); }
  [[nodiscard]] bool empty() const { return tokens.empty(); }
};

}  // namespace batchcore
