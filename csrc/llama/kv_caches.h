// The KV caches behind llama.cpp's memory, which its public API does not show.
#pragma once

#include <memory>
#include <vector>

#include "kernels/seam.h"

class llama_kv_cache;
struct llama_memory_i;

namespace batchcore {

struct KvCacheRef {
  llama_kv_cache* cache = nullptr;
  bool is_windowed = false;  ///< its layers see a sliding window
};

/// The caches of attention layers; empty for memories without any, or of a kind not known here.
[[nodiscard]] std::vector<KvCacheRef> kv_caches(llama_memory_i* memory);

/// Has batchcore's kernels compute the attention over these caches as long as the result lives.
[[nodiscard]] std::vector<std::unique_ptr<kernels::CacheScope>> use_attention_kernels(
    llama_memory_i* memory);

}  // namespace batchcore
