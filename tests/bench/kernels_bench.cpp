// Matrix products of every weight format on every instruction set that this CPU has, weights in the
// cache; quantising activations; attention. One thread. items/s are multiply-adds per second.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_scene.h"
#include "kernels/attention_task.h"
#include "kernels/cpu_select.h"

namespace {

using namespace batchcore;
using namespace batchcore::kernels;

void product(benchmark::State& state, const KernelSet* set, WeightFormat format) {
  constexpr std::int64_t kColumns = 1024;
  constexpr std::int64_t kOutputs = 256;
  bench::ProductScene scene(format, kColumns, kOutputs, state.range(0));
  scene.quantize(*set);
  for (auto _ : state) {
    scene.multiply(*set, 0, kOutputs / kGroupRows);
    benchmark::DoNotOptimize(scene.results.data());
  }
  state.SetItemsProcessed(state.iterations() * state.range(0) * kColumns * kOutputs);
}

void quantize(benchmark::State& state, const KernelSet* set) {
  bench::ProductScene scene(WeightFormat::kQ4_K, 4096, kGroupRows, 1);
  for (auto _ : state) {
    scene.quantize(*set);
    benchmark::DoNotOptimize(scene.blocks.data());
  }
  state.SetItemsProcessed(state.iterations() * scene.columns);
}

// 16 rows × 4 heads of 128 values over 512 keys in half precision.
void attention(benchmark::State& state, const KernelSet* set) {
  constexpr std::int32_t kSize = 128;
  constexpr std::int32_t kKeys = 512;
  constexpr std::int32_t kHeads = 4;
  const auto num_rows = static_cast<std::int32_t>(state.range(0));
  std::vector<float> queries(static_cast<std::size_t>(num_rows * kHeads * kSize), 0.1F);
  std::vector<std::uint16_t> cache(static_cast<std::size_t>(kKeys * kSize), 0x2e66);  // 0.1
  std::vector<std::int32_t> cells(kKeys);
  std::vector<std::int32_t> block_ids;
  for (std::int32_t i = 0; i < kKeys; ++i) cells[static_cast<std::size_t>(i)] = i;
  for (std::int32_t i = 0; i < kKeys / kKeyBlock; ++i) block_ids.push_back(i);
  std::vector<float> outputs(queries.size());
  std::vector<float> scratch(attention_scratch(kSize, kSize));
  const std::vector<float> slopes(kHeads, 1.0F);
  const CacheRows rows{.base = reinterpret_cast<const std::uint8_t*>(cache.data()),
                       .stride = 2 * kSize,
                       .type = CacheType::kF16,
                       .to_float = nullptr};
  AttentionTask task{};
  task.key_size = task.value_size = kSize;
  task.num_rows = num_rows;
  task.num_heads = kHeads;
  task.scale = 0.1F;
  task.slopes = slopes.data();
  task.queries = reinterpret_cast<const std::uint8_t*>(queries.data());
  task.query_head_stride = sizeof(float) * kSize;
  task.query_row_stride = kHeads * task.query_head_stride;
  task.keys = task.values = rows;
  task.cells = cells.data();
  task.block_ids = block_ids.data();
  task.num_blocks = kKeys / kKeyBlock;
  task.outputs = outputs.data();
  task.output_head_stride = kSize;
  task.output_row_stride = kHeads * kSize;
  for (auto _ : state) {
    set->attend(task, scratch.data());
    benchmark::DoNotOptimize(outputs.data());
  }
  state.SetItemsProcessed(state.iterations() * num_rows * kHeads * kKeys * kSize * 2);
}

const bool registered = [] {
  for (const KernelSet* const* set = usable_kernels(); *set != nullptr; ++set) {
    const std::string name = (*set)->name;
    for (int format = 0; format < kNumFormats; ++format) {
      benchmark::RegisterBenchmark(("product/" + name + "/" + bench::kFormatNames[format]).c_str(),
                                   product, *set, static_cast<WeightFormat>(format))
          ->Arg(1)
          ->Arg(5)
          ->Arg(16)
          ->Arg(128);
    }
    benchmark::RegisterBenchmark(("quantize/" + name).c_str(), quantize, *set);
    benchmark::RegisterBenchmark(("attention/" + name).c_str(), attention, *set)->Arg(1)->Arg(16);
  }
  return true;
}();

}  // namespace
