// One row of logits to one token, by vocabulary, parameters and shape of the logits, on one thread.
// Bytes per second count each logit once: beside those of row/read, the most that the memory
// allows, they say how far a sampler is from its bound.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "bench_fixture.h"
#include "core/vocab.h"
#include "engine/logit_kernels.h"
#include "engine/sampler.h"

namespace {

using namespace batchcore;

// As many rows as a step of 16 sequences has: together more than a core's own caches hold.
constexpr std::size_t kNumRows = 16;

struct Logits {
  // Peaked rows have a few clear favourites, as those of a language model; flat ones don't, so that
  // nearly all tokens stay candidates.
  Logits(std::int64_t size, bool flat) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0F, flat ? 1.0F : 2.5F);
    for (std::int64_t i = 0; i < size; ++i) vocab.add_piece("x");
    rows.resize(kNumRows, std::vector<float>(static_cast<std::size_t>(size)));
    for (std::vector<float>& row : rows) {
      for (float& logit : row) logit = normal(random);
      for (int i = 0; i < 20 && !flat; ++i) {
        row[random() % row.size()] = 18.0F - static_cast<float>(i) * 0.4F;
      }
    }
  }

  Vocab vocab;
  std::vector<std::vector<float>> rows;
};

Logits& logits_of(const benchmark::State& state) {
  return bench::fixture<Logits>(state.range(0), state.range(1) != 0);
}

void count_bytes(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations());
  state.SetBytesProcessed(state.iterations() * state.range(0) *
                          static_cast<std::int64_t>(sizeof(float)));
}

void sample(benchmark::State& state, const SamplingParams& params, int num_outputs) {
  const Logits& logits = logits_of(state);
  std::mt19937 random(2);
  std::vector<Sampler> samplers;
  for (std::size_t i = 0; i < kNumRows; ++i) {
    samplers.emplace_back(params, static_cast<std::int32_t>(i), logits.vocab,
                          std::span<const Token>{});
    for (int n = 0; n < num_outputs; ++n) {
      samplers.back().accept(static_cast<Token>(random() % logits.rows[i].size()));
    }
  }
  SamplerScratch scratch;
  std::size_t i = 0;
  for (auto _ : state) {
    SampledToken sampled = samplers[i].sample(logits.rows[i].data(), scratch);
    benchmark::DoNotOptimize(sampled.token);
    i = (i + 1) % kNumRows;
  }
  count_bytes(state);
}

SamplingParams greedy() { return {}; }
SamplingParams greedy_penalties() {
  SamplingParams params;
  params.repetition_penalty = 1.1F;
  return params;
}
SamplingParams greedy_logprobs() {
  SamplingParams params;
  params.logprobs = 5;
  return params;
}
SamplingParams temperature() {
  SamplingParams params;
  params.temperature = 0.8F;
  return params;
}
SamplingParams top_p() {
  SamplingParams params = temperature();
  params.top_p = 0.95F;
  return params;
}
SamplingParams min_p() {
  SamplingParams params = temperature();
  params.min_p = 0.05F;
  return params;
}
SamplingParams top_k_top_p() {
  SamplingParams params = top_p();
  params.top_k = 40;
  return params;
}
SamplingParams penalties() {
  SamplingParams params = top_k_top_p();
  params.repetition_penalty = 1.1F;
  params.frequency_penalty = 0.2F;
  return params;
}

const auto every_row = [](auto* one) {
  one->ArgNames({"vocab", "flat"})
      ->ArgsProduct({{49'152, 262'144}, {0, 1}})
      ->Unit(benchmark::kMicrosecond);
};

BENCHMARK_CAPTURE(sample, greedy, greedy(), 0)->Apply(every_row);
BENCHMARK_CAPTURE(sample, greedy_penalties_512, greedy_penalties(), 512)->Apply(every_row);
BENCHMARK_CAPTURE(sample, greedy_logprobs_5, greedy_logprobs(), 0)->Apply(every_row);
BENCHMARK_CAPTURE(sample, temperature, temperature(), 0)->Apply(every_row);
BENCHMARK_CAPTURE(sample, top_k_40_top_p, top_k_top_p(), 0)->Apply(every_row);
BENCHMARK_CAPTURE(sample, top_k_40_top_p_penalties_512, penalties(), 512)->Apply(every_row);
BENCHMARK_CAPTURE(sample, top_p, top_p(), 0)->Apply(every_row);
BENCHMARK_CAPTURE(sample, min_p, min_p(), 0)->Apply(every_row);

// What samplers are made of. Where a row is only read, it is copied into a buffer that stays in the
// first-level cache: the speed of the caches and the memory themselves.
constexpr std::size_t kChunk = 2048;

void read_row(const float* row, std::size_t size, float* into) {
  for (std::size_t at = 0; at < size; at += kChunk) {
    std::memcpy(into, row + at, std::min(kChunk, size - at) * sizeof(float));
    benchmark::ClobberMemory();
  }
}
void row_maxima(const float* row, std::size_t size, float* into) {
  block_maxima(row, size / kLogitBlock, into);
}
void row_masses(const float* row, std::size_t size, float* into) {
  block_masses(row, size / kLogitBlock, {.max = 18.0F, .inverse_temperature = 1.25F}, into);
}

void row(benchmark::State& state, void (*pass)(const float*, std::size_t, float*)) {
  const Logits& logits = logits_of(state);
  std::vector<float> results(kChunk);  // and room for one value per block
  std::size_t i = 0;
  for (auto _ : state) {
    pass(logits.rows[i].data(), logits.rows[i].size(), results.data());
    benchmark::ClobberMemory();
    i = (i + 1) % kNumRows;
  }
  count_bytes(state);
}

const auto one_shape = [](auto* one) {
  one->ArgNames({"vocab", "flat"})
      ->ArgsProduct({{49'152, 262'144}, {0}})
      ->Unit(benchmark::kMicrosecond);
};
BENCHMARK_CAPTURE(row, read, read_row)->Apply(one_shape);
BENCHMARK_CAPTURE(row, maxima, row_maxima)->Apply(one_shape);
BENCHMARK_CAPTURE(row, masses, row_masses)->Apply(one_shape);

}  // namespace
