// Microseconds that one row costs, by vocabulary and parameters. Logits are bell-shaped with a few
// clear favourites, as a language model's are. Usage: sampler_bench [repetitions]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "engine/sampler.h"

namespace {

using batchcore::Sampler;
using batchcore::SamplerScratch;
using batchcore::SamplingParams;
using batchcore::Token;
using batchcore::Vocab;

struct Case {
  const char* name;
  SamplingParams params;
  std::size_t penalised = 0;  ///< output tokens before the measured one
};

std::vector<Case> cases() {
  SamplingParams greedy;
  SamplingParams all;
  all.temperature = 0.8F;
  SamplingParams top_k = all;
  top_k.top_k = 40;
  top_k.top_p = 0.95F;
  SamplingParams top_p = all;
  top_p.top_p = 0.95F;
  SamplingParams min_p = all;
  min_p.min_p = 0.05F;
  SamplingParams penalties = top_k;
  penalties.repetition_penalty = 1.1F;
  penalties.frequency_penalty = 0.2F;
  SamplingParams greedy_penalties = greedy;
  greedy_penalties.repetition_penalty = 1.1F;
  SamplingParams logprobs = greedy;
  logprobs.logprobs = 5;
  return {{"greedy", greedy},
          {"greedy, 500 penalised", greedy_penalties, 500},
          {"greedy, logprobs 5", logprobs},
          {"T .8", all},
          {"T .8 top_k 40 top_p .95", top_k},
          {"same, 500 penalised", penalties, 500},
          {"T .8 top_p .95", top_p},
          {"T .8 min_p .05", min_p}};
}

std::vector<float> make_row(std::size_t size, bool flat, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0F, flat ? 1.0F : 2.5F);
  std::vector<float> row(size);
  for (float& logit : row) logit = normal(random);
  for (int i = 0; i < 20 && !flat; ++i) row[random() % size] = 18.0F - static_cast<float>(i) * 0.4F;
  return row;
}

double best_us(const Case& which, const Vocab& vocab, const std::vector<std::vector<float>>& rows,
               int repetitions) {
  std::mt19937 random(2);
  std::vector<Sampler> samplers;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    samplers.emplace_back(which.params, static_cast<std::int32_t>(i), vocab,
                          std::span<const Token>{});
    for (std::size_t n = 0; n < which.penalised; ++n) {
      samplers.back().accept(static_cast<Token>(random() % rows[i].size()));
    }
  }
  SamplerScratch scratch;
  std::vector<double> times;
  std::int64_t sink = 0;
  for (int r = 0; r < repetitions; ++r) {
    const auto begin = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      sink += samplers[i].sample(rows[i].data(), scratch).token;
    }
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - begin;
    times.push_back(elapsed.count() / static_cast<double>(rows.size()));
  }
  if (sink < 0) std::puts("no token");
  return *std::min_element(times.begin(), times.end());
}

}  // namespace

int main(int argc, char** argv) {
  const int repetitions = argc > 1 ? std::max(std::atoi(argv[1]), 1) : 100;
  std::printf("us per row, best of all repetitions, 16 rows, one thread\n%-28s %10s %10s %16s\n",
              "", "49,152", "262,144", "262,144 (flat)");
  std::vector<Vocab> vocabs(3);
  std::vector<std::vector<std::vector<float>>> rows(3);
  const std::size_t sizes[] = {49152, 262144, 262144};
  std::mt19937 random(1);
  for (std::size_t v = 0; v < 3; ++v) {
    for (std::size_t i = 0; i < sizes[v]; ++i) vocabs[v].add_piece("x");
    for (int i = 0; i < 16; ++i) rows[v].push_back(make_row(sizes[v], v == 2, random));
  }
  for (const Case& which : cases()) {
    std::printf("%-28s", which.name);
    const int widths[] = {11, 11, 17};
    for (std::size_t v = 0; v < 3; ++v) {
      std::printf("%*.1f", widths[v], best_us(which, vocabs[v], rows[v], repetitions));
    }
    std::printf("\n");
  }
}
