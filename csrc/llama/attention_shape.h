// What attention goes over in a decode call of llama.cpp.
#pragma once

#include "core/backend.h"
#include "core/micro_batch.h"

struct llama_memory_i;

namespace batchcore {

/// For the batch that was decoded last. `window`: the model's sliding window in tokens.
[[nodiscard]] AttentionShape attention_shape(llama_memory_i* memory, const MicroBatch& batch,
                                             std::int32_t window);

}  // namespace batchcore
