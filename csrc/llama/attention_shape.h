// What attention goes over in a decode call of llama.cpp.
#pragma once

#include "core/backend.h"
#include "core/micro_batch.h"

struct llama_memory_i;

namespace batchcore {

/// For the batch that was decoded last. `window`: the model's sliding window in tokens.
/// `uses_kernels`: batchcore's kernels compute the attention, see
/// Context::uses_attention_kernels().
[[nodiscard]] AttentionShape attention_shape(llama_memory_i* memory, const MicroBatch& batch,
                                             std::int32_t window, bool uses_kernels);

}  // namespace batchcore
