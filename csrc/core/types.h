// Plain names shared by every layer. No llama.cpp, no Python.
#pragma once

#include <cstdint>
#include <vector>

namespace batchcore {

/// Index into a model's vocabulary.
using Token = std::int32_t;

/// A KV slot; the same number is llama.cpp's sequence id.
using SeqId = std::int32_t;

/// Assigned by the engine at submit, unique over its life, never 0.
using RequestId = std::uint64_t;

/// A user while the engine knows it; 0 is the empty name.
using UserId = std::int32_t;

/// Position of a token in its sequence, from 0.
using Position = std::int32_t;

/// How the KV cells of one context are laid out.
enum class KvLayout {
  kUnified,  ///< one pool of cells that every sequence draws from
  kStreams,  ///< a fixed partition per sequence (llama.cpp's non-unified buffer)
};

/// What kind of memory a model keeps for the tokens it has seen.
enum class MemoryKind {
  kNone,           ///< encoder-only: nothing is kept, so nothing can be generated
  kAttention,      ///< every position stays in a KV cell
  kSlidingWindow,  ///< some layers only keep the last window of positions
  kRecurrent,      ///< one state per sequence: can't be cut back to an earlier position
  kHybrid,         ///< attention layers beside recurrent ones
};

/// One candidate of a step with its log-probability (natural logarithm).
struct TokenLogprob {
  Token token = -1;
  float logprob = 0.0F;
};

/// Log-probabilities at one generated position.
struct PositionLogprobs {
  TokenLogprob sampled;
  std::vector<TokenLogprob> top;  ///< most likely first, as many as were asked for
};

}  // namespace batchcore
