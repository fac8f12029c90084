// What share of this CPU's bounds the matrix products reach, by weight format, shape and rows. The
// bounds are measured first: multiply-adds of 8-bit integers in registers, and bytes per second
// from memory. A product can take no less than its multiply-adds or its weights need, whichever is
// more. Usage: kernel_roofline [threads]
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string_view>
#include <thread>
#include <vector>

#include "kernel_scene.h"
#include "kernels/cpu_select.h"

namespace {

using namespace batchcore;
using namespace batchcore::kernels;

constexpr int kRepetitions = 7;

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The least seconds of several runs of f(thread) on all threads at once.
double least_seconds(int num_threads, const std::function<void(int)>& f) {
  double least = 1e30;
  for (int i = 0; i < kRepetitions; ++i) {
    std::atomic<int> num_ready{0};
    std::vector<double> ends(static_cast<std::size_t>(num_threads));
    double start = 0;
    const auto run = [&](int thread) {
      num_ready.fetch_add(1);
      while (num_ready.load() < num_threads) {
      }
      if (thread == 0) start = now_s();
      f(thread);
      ends[static_cast<std::size_t>(thread)] = now_s();
    };
    std::vector<std::thread> helpers;
    for (int t = 1; t < num_threads; ++t) helpers.emplace_back(run, t);
    run(0);
    for (std::thread& helper : helpers) helper.join();
    least = std::min(least, *std::max_element(ends.begin(), ends.end()) - start);
  }
  return least;
}

double product_seconds(const KernelSet& set, bench::ProductScene& scene, int num_threads) {
  const std::int64_t num_groups = scene.num_outputs / kGroupRows;
  const std::int64_t per_item = std::max<std::int64_t>(2, num_groups / (8 * num_threads) / 2 * 2);
  std::atomic<std::int64_t> next{0};
  std::atomic<int> num_done{0};
  return least_seconds(num_threads, [&](int) {
    for (;;) {
      const std::int64_t begin = next.fetch_add(per_item);
      if (begin >= num_groups) break;
      scene.multiply(set, begin, std::min(begin + per_item, num_groups));
    }
    if (num_done.fetch_add(1) + 1 == num_threads) {
      num_done = 0;
      next = 0;
    }
  });
}

double memory_bytes_per_second(int num_threads) {
  constexpr std::size_t kWords = std::size_t{32} << 20;  // 256 MiB
  const std::vector<std::uint64_t> words(kWords, 1);
  std::atomic<std::uint64_t> sink{0};
  const double seconds = least_seconds(num_threads, [&](int thread) {
    const std::size_t share = kWords / static_cast<std::size_t>(num_threads);
    const std::uint64_t* at = words.data() + share * static_cast<std::size_t>(thread);
    std::uint64_t sums[8] = {};
    for (std::size_t i = 0; i + 8 <= share; i += 8) {
      for (std::size_t j = 0; j < 8; ++j) sums[j] += at[i + j];
    }
    for (const std::uint64_t sum : sums) sink += sum;
  });
  return 8.0 * kWords / seconds;
}

struct Shape {
  WeightFormat format;
  std::int64_t columns;
  std::int64_t num_outputs;
};

// Of Gemma 3 270M, SmolLM2 135M, and models of 8B.
constexpr Shape kShapes[] = {
    {WeightFormat::kQ5_0, 640, 2048},    {WeightFormat::kQ4_K, 2048, 640},
    {WeightFormat::kQ6_K, 2048, 640},    {WeightFormat::kQ8_0, 640, 262144},
    {WeightFormat::kQ4_1, 576, 1536},    {WeightFormat::kQ8_0, 576, 49152},
    {WeightFormat::kQ4_K, 4096, 14336},  {WeightFormat::kQ6_K, 14336, 4096},
    {WeightFormat::kQ5_K, 4096, 4096},   {WeightFormat::kQ4_0, 4096, 4096},
    {WeightFormat::kQ5_1, 4096, 4096},   {WeightFormat::kQ8_0, 4096, 4096},
    {WeightFormat::kQ2_K, 4096, 4096},   {WeightFormat::kQ3_K, 4096, 4096},
    {WeightFormat::kIQ4_XS, 4096, 4096}, {WeightFormat::kF16, 4096, 4096},
};
constexpr std::int64_t kRows[] = {1, 2, 4, 5, 8, 16, 64, 256};

// Ten independent chains of multiply-adds, all operands in registers. Returns the number made.
constexpr int kChains = 10;
constexpr std::int64_t kSteps = 2'000'000;

__attribute__((target("avx512f,avx512vnni"))) double spin_avx512() {
  __m512i sums[kChains] = {};
  for (__m512i& sum : sums) __asm__ volatile("" : "+v"(sum));  // not known to be equal
  __m512i weights = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    __asm__ volatile("" : "+v"(weights));
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, weights, weights);
  }
  for (__m512i& sum : sums) __asm__ volatile("" : "+v"(sum));
  return 64.0 * kChains * kSteps;
}

__attribute__((target("avx2"))) double spin_avx2() {
  __m256i sums[kChains] = {};
  for (__m256i& sum : sums) __asm__ volatile("" : "+x"(sum));
  __m256i weights = _mm256_set1_epi8(1);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    __asm__ volatile("" : "+x"(weights));
    for (__m256i& sum : sums) {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, weights), ones));
    }
  }
  for (__m256i& sum : sums) __asm__ volatile("" : "+x"(sum));
  return 32.0 * kChains * kSteps;
}

double integer_rate(const KernelSet& set, int num_threads) {
  const bool is_wide = std::string_view(set.name).starts_with("avx512");
  std::atomic<double> made{0};
  const double seconds = least_seconds(
      num_threads, [&](int) { made = num_threads * (is_wide ? spin_avx512() : spin_avx2()); });
  return made / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const double bytes_per_s = memory_bytes_per_second(num_threads);
  std::printf("%d threads; memory %.1f GB/s\n", num_threads, bytes_per_s / 1e9);
  for (const KernelSet* const* set = usable_kernels(); *set != nullptr; ++set) {
    const double rate = integer_rate(**set, num_threads);
    std::printf("\n%s: %.0f G multiply-adds/s in registers\n", (*set)->name, rate / 1e9);
    std::printf("| weights | rows | ms | G multiply-adds/s | GB/s | share of the bound |\n");
    std::printf("|---|---|---|---|---|---|\n");
    for (const Shape& shape : kShapes) {
      for (const std::int64_t rows : kRows) {
        bench::ProductScene scene(shape.format, shape.columns, shape.num_outputs, rows);
        scene.quantize(**set);
        const double seconds = product_seconds(**set, scene, num_threads);
        const double work = static_cast<double>(rows) * static_cast<double>(shape.columns) *
                            static_cast<double>(shape.num_outputs);
        const auto bytes = static_cast<double>(scene.num_weight_bytes);
        // Weights that the caches keep are not read from memory: no bound by it then.
        constexpr double kCached = 24e6;
        const double bound = std::max(work / rate, bytes > kCached ? bytes / bytes_per_s : 0.0);
        std::printf("| %s %lld×%lld | %lld | %.3f | %.0f | %.1f | %.0f%% |\n",
                    bench::kFormatNames[static_cast<int>(shape.format)],
                    static_cast<long long>(shape.columns),
                    static_cast<long long>(shape.num_outputs), static_cast<long long>(rows),
                    seconds * 1e3, work / seconds / 1e9, bytes / seconds / 1e9,
                    100 * bound / seconds);
        std::fflush(stdout);
      }
    }
  }
  return 0;
}
