// What calls compute for nothing, as the engine counts it.
#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "scene.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::numbers;
using testing::request;
using testing::SimEngine;
using testing::SimOptions;

TEST_CASE("attention over whole caches goes over the same cells for every row") {
  AttentionShape shape;
  shape.num_full_layers = 2;
  shape.num_window_layers = 1;
  shape.window = 8;
  shape.computed_per_row = 3 * 256;
  CHECK(shape.needed(0) == 3);
  CHECK(shape.needed(39) == 2 * 40 + 8);
  CHECK(shape.computed(0) == 768);
  CHECK(shape.computed(39) == 768);
}

TEST_CASE("attention over a row's own sequence goes over blocks of positions") {
  AttentionShape shape;
  shape.num_full_layers = 2;
  shape.block = 32;
  CHECK(shape.computed(0) == 2 * 32);
  CHECK(shape.computed(31) == 2 * 32);
  CHECK(shape.computed(32) == 2 * 64);
  shape.num_window_layers = 1;
  shape.window = 8;
  CHECK(shape.computed(7) == 2 * 32 + 32);
  CHECK(shape.computed(38) == 2 * 64 + 64);    // the window begins at 31
  CHECK(shape.computed(39) == 2 * 64 + 32);    // at 32
  CHECK(shape.computed(100) == 2 * 128 + 64);  // at 93, in the block before
}

/// Attention as batchcore's kernels compute it.
struct BlockBackend : SimBackend {
  using SimBackend::SimBackend;
  [[nodiscard]] AttentionShape attention_shape(const MicroBatch&) const override {
    AttentionShape shape;
    shape.num_full_layers = 1;
    shape.block = 32;
    return shape;
  }
};

TEST_CASE("other sequences are not counted where attention skips them") {
  SimOptions options;
  options.num_cells = 512;
  auto owned = std::make_unique<BlockBackend>(testing::sim_info(options), options.cost);
  SimEngine sim(std::move(owned), options);
  RequestSpec brief = request(numbers(1, 4), 3);
  RequestSpec longer = request(numbers(10, 40), 3);
  brief.sampling.ignore_eos = longer.sampling.ignore_eos = true;
  const auto first = sim.engine.submit(std::move(brief));
  const auto second = sim.engine.submit(std::move(longer));
  REQUIRE(sim.run());
  // Rows of 4 prompt tokens and 2 of 3 generated ones, at positions 0 to 5.
  const RequestMetrics alone = collect(*first).metrics;
  CHECK(alone.attention_needed == 1 + 2 + 3 + 4 + 5 + 6);
  CHECK(alone.attention_computed == 6 * 32);
  const RequestMetrics beside = collect(*second).metrics;
  CHECK(beside.attention_computed == 32 * 32 + 10 * 64);
  const EngineStats stats = sim.engine.stats();
  CHECK(stats.attention_computed == alone.attention_computed + beside.attention_computed);
  CHECK(stats.attention_needed == alone.attention_needed + beside.attention_needed);
}

}  // namespace
}  // namespace batchcore
