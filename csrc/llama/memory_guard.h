#pragma once

#include <cstdint>

#include "llama/context.h"
#include "llama/llama_model.h"

namespace batchcore {

/// Bytes of memory that programs can have without swapping; 0 where the system does not say.
[[nodiscard]] std::uint64_t available_host_bytes();

/// Throws EngineError where the KV cells of a context would need more host memory than is free.
/// Linux hands out memory it does not have, so without this the process is killed while llama.cpp
/// clears the cells. Says nothing where the size can't be known beforehand (cells on a GPU,
/// compressed or windowed caches): there, llama.cpp's own allocation decides.
void check_host_memory(const LlamaModel& model, const ContextParams& params);

}  // namespace batchcore
