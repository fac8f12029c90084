#include "llama/kv_caches.h"

// Upstream's internal headers, at the pinned commit.
#include <../src/llama-kv-cache-iswa.h>
#include <../src/llama-kv-cache.h>
#include <../src/llama-kv-cells.h>
#include <../src/llama-memory-hybrid-iswa.h>
#include <../src/llama-memory-hybrid.h>

#include <algorithm>
#include <span>
#include <utility>

namespace batchcore {
namespace {

// Reads positions where llama.cpp keeps them, so that no copy, move or restored state can be
// missed.
class CellsOfCache final : public kernels::CellPositions {
 public:
  explicit CellsOfCache(const llama_kv_cache& cache) : cache_(cache) {
    // Stream of a sequence to a sequence of the stream.
    sequence_of_.assign(cache.get_n_stream(), 0);
    for (std::uint32_t sequence = 0; sequence < cache.get_n_seq_max(); ++sequence) {
      const auto id = static_cast<llama_seq_id>(sequence);
      sequence_of_[cache.get_stream(id)] = id;
    }
  }

  void read(std::int32_t first_stream, std::int32_t num_streams, std::int32_t num_cells,
            std::span<std::int32_t> positions) override {
    std::size_t to = 0;
    for (std::int32_t stream = first_stream; stream < first_stream + num_streams; ++stream) {
      const llama_kv_cells& cells =
          cache_.get_cells(sequence_of_[static_cast<std::size_t>(stream)]);
      for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(num_cells); ++i) {
        positions[to++] = cells.is_empty(i) ? -1 : cells.pos_get(i);
      }
    }
  }

 private:
  const llama_kv_cache& cache_;
  std::vector<llama_seq_id> sequence_of_;
};

}  // namespace

std::vector<KvCacheRef> kv_caches(llama_memory_i* memory) {
  llama_kv_cache* full = nullptr;
  const llama_kv_cache_iswa* windowed = dynamic_cast<llama_kv_cache_iswa*>(memory);
  if (const auto* hybrid = dynamic_cast<llama_memory_hybrid*>(memory)) {
    full = hybrid->get_mem_attn();
  } else if (const auto* both = dynamic_cast<llama_memory_hybrid_iswa*>(memory)) {
    windowed = both->get_mem_attn();
  } else {
    full = dynamic_cast<llama_kv_cache*>(memory);
  }
  std::vector<KvCacheRef> caches;
  if (full != nullptr) caches.push_back({full, false});
  if (windowed != nullptr) {
    caches.push_back({windowed->get_base(), false});
    caches.push_back({windowed->get_swa(), true});
  }
  return caches;
}

std::vector<std::unique_ptr<kernels::CacheScope>> use_attention_kernels(llama_memory_i* memory) {
  std::vector<std::unique_ptr<kernels::CacheScope>> scopes;
  for (const KvCacheRef& ref : kv_caches(memory)) {
    std::vector<std::uint32_t> ids = ref.cache->get_layer_ids();
    std::sort(ids.begin(), ids.end());
    std::vector<const void*> layers;
    for (const std::uint32_t id : ids) {
      layers.push_back(ref.cache->get_k_storage(static_cast<std::int32_t>(id)));
    }
    if (layers.empty()) continue;
    scopes.push_back(std::make_unique<kernels::CacheScope>(
        std::move(layers), std::make_unique<CellsOfCache>(*ref.cache)));
  }
  return scopes;
}

}  // namespace batchcore
