#include "llama/attention_shape.h"

// Upstream's internal headers, at the pinned commit: the public API does not say how far the cells
// in use reach, which is what every row of a call goes over.
#include <../src/llama-kv-cache.h>
#include <../src/llama-kv-cells.h>

#include <algorithm>

#include "kernels/attention_task.h"
#include "llama/kv_caches.h"

namespace batchcore {
namespace {

// llama_kv_cache::get_n_kv(): in blocks, up to the last cell in use of any stream of the batch.
std::int64_t cells_per_row(const llama_kv_cache& cache, const MicroBatch& batch) {
  constexpr std::uint32_t kBlock = 256;
  std::uint32_t cells = 0;
  const auto reach = [&](SeqId seq_id) {
    const std::uint32_t used = cache.get_cells(seq_id).used_max_p1();
    const std::uint32_t whole = std::max(kBlock, (used + kBlock - 1) / kBlock * kBlock);
    cells = std::max(cells, std::min(cache.get_size(), whole));
  };
  if (cache.get_n_stream() == 1) {
    reach(batch.seq_ids.front());
  } else {
    SeqId before = -1;
    for (const SeqId seq_id : batch.seq_ids) {
      if (seq_id != before) reach(seq_id);
      before = seq_id;
    }
  }
  return cells;
}

}  // namespace

AttentionShape attention_shape(llama_memory_i* memory, const MicroBatch& batch, std::int32_t window,
                               bool uses_kernels) {
  AttentionShape shape;
  shape.window = window;
  if (uses_kernels) shape.block = kernels::kKeyBlock;
  for (const KvCacheRef& ref : kv_caches(memory)) {
    const auto num_layers = static_cast<std::int32_t>(ref.cache->get_layer_ids().size());
    (ref.is_windowed ? shape.num_window_layers : shape.num_full_layers) += num_layers;
    if (!uses_kernels) shape.computed_per_row += num_layers * cells_per_row(*ref.cache, batch);
  }
  return shape;
}

}  // namespace batchcore
