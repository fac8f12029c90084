// What the scheduler learns from a step and looks up for the next one: cost of a step, shapes of
// calls, lengths of outputs, latencies. Each once or more per step.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "core/call_times.h"
#include "core/histogram.h"
#include "core/output_history.h"
#include "core/step_cost.h"

namespace {

using namespace batchcore;

void step_cost_observe(benchmark::State& state) {
  StepCost cost;
  std::int32_t step = 0;
  for (auto _ : state) {
    const std::int32_t prefill = 64 * (step++ % 8);
    cost.observe({prefill, 16, 16 * 300}, 0.02 + 1e-4 * prefill);
  }
}
BENCHMARK(step_cost_observe);

void step_cost_seconds(benchmark::State& state) {
  StepCost cost;
  for (int i = 0; i < 100; ++i) cost.observe({64 * (i % 8), 16, 16 * 300}, 0.02 + 0.01 * (i % 8));
  for (auto _ : state) {
    double seconds = cost.seconds({64, 16, 16 * 300});
    benchmark::DoNotOptimize(seconds);
  }
}
BENCHMARK(step_cost_seconds);

// Both sizes are known, so that two medians decide.
void call_times_preferred(benchmark::State& state) {
  CallTimes times;
  for (int i = 0; i < 8; ++i) {
    times.observe(15, 0.021 + 1e-4 * i);
    times.observe(16, 0.020 + 1e-4 * i);
  }
  for (auto _ : state) {
    std::int32_t preferred = times.preferred(15, 4);
    benchmark::DoNotOptimize(preferred);
  }
}
BENCHMARK(call_times_preferred);

void call_times_observe(benchmark::State& state) {
  CallTimes times;
  std::int32_t rows = 0;
  for (auto _ : state) {
    times.observe(rows, 0.02);
    rows = (rows + 1) % 256;
  }
}
BENCHMARK(call_times_observe);

// Once per running sequence whenever somebody might be admitted.
void output_history_expected(benchmark::State& state) {
  OutputHistory history;
  for (int i = 0; i < 128; ++i) history.record(50 + i * 37 % 200);
  std::int32_t generated = 0;
  for (auto _ : state) {
    std::int32_t expected = history.expected(generated, 1000, 200);
    benchmark::DoNotOptimize(expected);
    generated = (generated + 7) % 200;
  }
}
BENCHMARK(output_history_expected);

// Twice per generated token.
void histogram_record(benchmark::State& state) {
  LogHistogram histogram;
  double seconds = 1e-3;
  for (auto _ : state) {
    histogram.record(seconds);
    benchmark::DoNotOptimize(histogram);
    seconds = seconds < 10.0 ? seconds * 1.1 : 1e-3;
  }
}
BENCHMARK(histogram_record);

}  // namespace
