#include "engine/candidates.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "engine/logit_kernels.h"
#include "engine/logit_view.h"
#include "sampler_reference.h"

namespace batchcore {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float random_logit(std::mt19937& random) {
  switch (random() % 12) {
    case 0:
      return kNoLogit;
    case 1:
      return kNan;
    case 2:
      return -kNoLogit;
    case 3:
      return kLargestLogit;
    case 4:
    case 5:
    case 6:
      return static_cast<float>(random() % 5);
    default:
      return std::normal_distribution<float>(0.0F, 6.0F)(random);
  }
}

TEST_CASE("kernels: a block's maximum ignores NaN wherever it is") {
  std::vector<float> logits(2 * kLogitBlock, kNan);
  float maxima[2];
  for (std::size_t i = 0; i < kLogitBlock; ++i) {
    logits[kLogitBlock + i] = -3.5F;
    block_maxima(logits.data(), 2, maxima);
    CHECK(maxima[0] == kNoLogit);
    CHECK(maxima[1] == -3.5F);
    logits[kLogitBlock + i] = kNan;
  }
}

TEST_CASE("kernels: weights are exp within 3e-7, 1 at the top, 0 below the smallest and for NaN") {
  const SoftmaxScale scale{};
  double worst = 0.0;
  for (float z = 0.0F; z > kMinExponent; z -= 0.0007F) {
    worst = std::max(worst, std::abs(scale.weight(z) / std::exp(static_cast<double>(z)) - 1.0));
  }
  CHECK(worst < 3e-7);
  CHECK(scale.weight(0.0F) == 1.0F);
  CHECK(scale.weight(5.0F) == 1.0F);
  CHECK(scale.weight(-kNoLogit) == 1.0F);
  CHECK(scale.weight(-87.5F) == 0.0F);
  CHECK(scale.weight(kNoLogit) == 0.0F);
  CHECK(scale.weight(kNan) == 0.0F);
  CHECK(SoftmaxScale{kLargestLogit, 1e5F}.weight(-kLargestLogit) == 0.0F);
}

TEST_CASE("kernels: a block's mass is the sum of its weights, to the last bit in fixed order") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0F, 20.0F);
  std::vector<float> logits(8 * kLogitBlock);
  for (float& logit : logits) logit = random() % 20 == 0 ? kNan : normal(random);
  const SoftmaxScale scale{60.0F, 1.7F};
  float masses[8];
  block_masses(logits.data(), 8, scale, masses);
  for (std::size_t b = 0; b < 8; ++b) {
    float lane[16] = {};
    for (std::size_t i = 0; i < kLogitBlock; ++i) {
      lane[i % 16] += scale.weight(logits[b * kLogitBlock + i]);
    }
    for (std::size_t width = 8; width > 0; width /= 2) {
      for (std::size_t l = 0; l < width; ++l) lane[l] += lane[l + width];
    }
    CHECK(masses[b] == lane[0]);
  }
}

TEST_CASE("view: replaced logits and the missing end of the last block") {
  std::mt19937 random(4);
  for (const std::size_t size : {1U, 255U, 256U, 257U, 1000U, 2048U}) {
    std::vector<float> logits(size);
    for (float& logit : logits) logit = static_cast<float>(random() % 100);
    std::vector<float> expected = logits;
    std::vector<TokenLogit> overrides;
    for (std::size_t i = random() % 7; i < size; i += 1 + random() % 300) {
      overrides.push_back({static_cast<Token>(i), -1.0F});
      expected[i] = -1.0F;
    }
    std::vector<std::uint32_t> starts;
    BlockBuffer buffer;
    const LogitView view(logits.data(), size, overrides, starts, buffer);
    expected.resize(view.num_blocks() * kLogitBlock, kNoLogit);
    for (std::size_t b = 0; b < view.num_blocks(); ++b) {
      CHECK(std::equal(view.block(b), view.block(b) + kLogitBlock,
                       expected.begin() + static_cast<std::ptrdiff_t>(b * kLogitBlock)));
    }
    std::vector<float> seen;
    view.for_each_run([&](const float* values, std::size_t first, std::size_t count) {
      CHECK(first * kLogitBlock == seen.size());
      seen.insert(seen.end(), values, values + count * kLogitBlock);
    });
    CHECK(seen == expected);
  }
}

TEST_CASE("select_top: the first tokens of the sorted row, ties by id") {
  std::mt19937 random(5);
  std::vector<std::uint32_t> starts;
  BlockBuffer buffer;
  std::vector<float> scratch;
  std::vector<Candidate> candidates;
  for (int round = 0; round < 400; ++round) {
    std::vector<float> logits(1 + random() % 3000);
    for (float& logit : logits) logit = random_logit(random);
    std::vector<Candidate> expected;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] > kNoLogit) expected.push_back({logits[i], 0.0F, static_cast<Token>(i)});
    }
    std::stable_sort(expected.begin(), expected.end(),
                     [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
    const LogitView view(logits.data(), logits.size(), {}, starts, buffer);
    std::vector<float> maxima(view.num_blocks());
    for (std::size_t b = 0; b < maxima.size(); ++b) block_maxima(view.block(b), 1, &maxima[b]);
    const std::size_t count = random() % 5 == 0 ? logits.size() : random() % 40;
    select_top(view, maxima, count, scratch, candidates);
    expected.resize(std::min(expected.size(), count));
    REQUIRE(candidates.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      REQUIRE(candidates[i].token == expected[i].token);
      REQUIRE(candidates[i].logit == expected[i].logit);
    }
  }
}

TEST_CASE("keep_mass: the shortest run of first candidates that holds the mass") {
  std::mt19937 random(6);
  for (int round = 0; round < 600; ++round) {
    std::vector<Candidate> candidates(1 + random() % 500);
    const bool ties = random() % 2 == 0;
    double total = 0.0;
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      const auto value = static_cast<float>(random() % (ties ? 4 : 1000));
      candidates[i] = {value, value / 1024.0F, static_cast<Token>(i)};  // exact sums
      total += candidates[i].weight;
    }
    std::vector<Candidate> sorted = candidates;
    std::sort(sorted.begin(), sorted.end(), comes_before);
    const double mass = std::max(total * static_cast<double>(random() % 11) / 10.0, 1e-9);
    std::size_t expected = 0;
    for (double sum = 0.0; expected < sorted.size() && sum < mass;)
      sum += sorted[expected++].weight;
    std::shuffle(candidates.begin(), candidates.end(), random);
    const std::size_t kept = keep_mass(candidates, mass);
    REQUIRE(kept == expected);
    std::sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(kept),
              comes_before);
    for (std::size_t i = 0; i < kept; ++i) REQUIRE(candidates[i].token == sorted[i].token);
  }
}

}  // namespace
}  // namespace batchcore
