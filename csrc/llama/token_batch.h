// The tokens of one low-level decode call, as a user put them together: any order, several
// sequences per token. The engine's own batches are core/micro_batch.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"

namespace batchcore {

struct TokenBatch {
  std::vector<Token> tokens;
  std::vector<Position> positions;
  std::vector<SeqId> seq_ids;         ///< of all tokens, one after another
  std::vector<std::size_t> seq_ends;  ///< per token, where its part of seq_ids ends
  std::vector<std::uint8_t> outputs;  ///< 1 where logits or embeddings are wanted

  void add(Token token, Position position, std::span<const SeqId> sequences, bool output) {
    tokens.push_back(token);
    positions.push_back(position);
    seq_ids.insert(seq_ids.end(), sequences.begin(), sequences.end());
    seq_ends.push_back(seq_ids.size());
    outputs.push_back(output ? 1 : 0);
  }
  void clear() {
    tokens.clear();
    positions.clear();
    seq_ids.clear();
    seq_ends.clear();
    outputs.clear();
  }
  [[nodiscard]] std::size_t size() const { return tokens.size(); }
  [[nodiscard]] std::span<const SeqId> sequences(std::size_t index) const {
    const std::size_t begin = index == 0 ? 0 : seq_ends[index - 1];
    return std::span(seq_ids).subspan(begin, seq_ends[index] - begin);
  }
};

}  // namespace batchcore
