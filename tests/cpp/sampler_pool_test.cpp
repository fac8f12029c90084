#include "engine/sampler_pool.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <deque>
#include <random>
#include <span>
#include <vector>

#include "sampler_reference.h"

namespace batchcore {
namespace {

struct Rows {
  Vocab vocab;
  std::vector<std::vector<float>> logits;
  std::deque<Sampler> samplers;

  // Large enough rows that workers are woken for them.
  explicit Rows(std::size_t count, std::int32_t size = 20000) : vocab(testing::make_vocab(size)) {
    std::mt19937 random(41);
    std::normal_distribution<float> normal(0.0F, 3.0F);
    for (std::size_t i = 0; i < count; ++i) {
      logits.emplace_back(static_cast<std::size_t>(size));
      for (float& logit : logits.back()) logit = normal(random);
      SamplingParams params;
      params.seed = i;
      params.temperature = i % 4 == 0 ? 0.0F : 0.9F;
      if (i % 4 == 1) params.top_p = 0.9F;
      if (i % 4 == 2) params.top_k = 30;
      params.frequency_penalty = i % 3 == 0 ? 0.5F : 0.0F;
      params.logprobs = i % 2 == 0 ? 4 : -1;
      samplers.emplace_back(params, 0, vocab, std::span<const Token>{});
    }
  }

  std::vector<SampledToken> run(SamplerPool& pool) {
    std::vector<SampledToken> results(samplers.size());
    std::vector<SampleJob> jobs;
    for (std::size_t i = 0; i < samplers.size(); ++i) {
      jobs.push_back({&samplers[i], logits[i].data(), &results[i]});
    }
    pool.run(jobs);
    return results;
  }
};

void check_same(const std::vector<SampledToken>& a, const std::vector<SampledToken>& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    REQUIRE(a[i].token == b[i].token);
    REQUIRE(a[i].logprobs.has_value() == b[i].logprobs.has_value());
    if (!a[i].logprobs) continue;
    REQUIRE(a[i].logprobs->sampled.logprob == b[i].logprobs->sampled.logprob);
    REQUIRE(a[i].logprobs->top.size() == b[i].logprobs->top.size());
    for (std::size_t j = 0; j < a[i].logprobs->top.size(); ++j) {
      REQUIRE(a[i].logprobs->top[j].token == b[i].logprobs->top[j].token);
      REQUIRE(a[i].logprobs->top[j].logprob == b[i].logprobs->top[j].logprob);
    }
  }
}

TEST_CASE("sampler pool: any number of threads gives the same tokens, step after step") {
  std::vector<std::vector<SampledToken>> expected;
  for (const int threads : {1, 2, 3, 8}) {
    Rows rows(33);
    SamplerPool pool(threads);
    CHECK(pool.num_threads() == threads);
    for (std::size_t step = 0; step < 6; ++step) {
      const std::vector<SampledToken> results = rows.run(pool);
      for (std::size_t i = 0; i < results.size(); ++i) {
        REQUIRE(results[i].valid());
        rows.samplers[i].accept(results[i].token);
      }
      if (threads == 1) {
        expected.push_back(results);
      } else {
        check_same(results, expected[step]);
      }
    }
  }
}

TEST_CASE("sampler pool: many short steps, and none at all") {
  Rows few(3, 200);
  Rows many(9);
  SamplerPool pool(4);
  pool.run({});
  const std::vector<SampledToken> first_few = few.run(pool);
  const std::vector<SampledToken> first_many = many.run(pool);
  for (int step = 0; step < 200; ++step) {
    check_same(few.run(pool), first_few);
    check_same(many.run(pool), first_many);
  }
}

TEST_CASE("sampler pool: starts and ends without work") {
  for (int threads = -1; threads < 6; ++threads) {
    const SamplerPool pool(threads);
    CHECK(pool.num_threads() == (threads < 1 ? 1 : threads));
  }
}

}  // namespace
}  // namespace batchcore
