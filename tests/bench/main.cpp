// What single parts of the core cost, apart from any model. All options are google-benchmark's:
// micro_bench --benchmark_filter='sample/greedy' --benchmark_repetitions=5
//
// In the benchmarks DoNotOptimize() comes last: compiled by GCC with sanitizers, it changes values
// of up to eight bytes (https://github.com/google/benchmark/issues/903 is of the kind).
#include <benchmark/benchmark.h>

#include <string>

#include "core/version.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  // The build type that google-benchmark reports is that of its own library, which distributions
  // compile with assertions; what counts is ours.
  benchmark::AddCustomContext("batchcore_version", std::string(batchcore::version()));
  benchmark::AddCustomContext("batchcore_build_type", BATCHCORE_BENCH_BUILD_TYPE);
#if defined(__VERSION__)
  benchmark::AddCustomContext("compiler", __VERSION__);
#endif
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
