// Looking for stop strings, per token. One iteration is one piece of text, taken from `safe` after
// each as a step that streams does.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bench_text.h"
#include "engine/stop_matcher.h"

namespace {

using namespace batchcore;
using Strings = std::vector<std::string>;

// The prose has the beginnings of three of them.
Strings four_stops() { return {"\nUser:", "###", "<|end|>", "STOP"}; }

void stop_matcher_push(benchmark::State& state, const Strings& stops, const Strings& pieces) {
  StopMatcher matcher(stops);
  std::string safe;
  std::size_t next = 0;
  for (auto _ : state) {
    auto match = matcher.push(pieces[next], safe);
    if (match) {
      state.SkipWithError("the text has a stop string");
      break;
    }
    benchmark::DoNotOptimize(safe.data());
    safe.clear();
    next = next + 1 == pieces.size() ? 0 : next + 1;
  }
  state.SetItemsProcessed(state.iterations());
  state.SetBytesProcessed(state.iterations() * bench::num_bytes(pieces) /
                          static_cast<std::int64_t>(pieces.size()));
}

BENCHMARK_CAPTURE(stop_matcher_push, no_stops, {}, bench::pieces_of(bench::prose(false)));
BENCHMARK_CAPTURE(stop_matcher_push, 4_stops, four_stops(), bench::pieces_of(bench::prose(false)));
// All of the text might begin a stop string and turns out not to: nothing is slower per byte.
BENCHMARK_CAPTURE(stop_matcher_push, near_misses, {"aaaaaaab", "aaaaaaaac"}, Strings(32, "aaaa"));

// Once per request; completions of one share it.
void stop_matcher_build(benchmark::State& state) {
  const Strings stops = four_stops();
  for (auto _ : state) {
    StopMatcher matcher(stops);
    benchmark::DoNotOptimize(matcher);
  }
}
BENCHMARK(stop_matcher_build);

}  // namespace
