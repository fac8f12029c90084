// Memory that sampling one row needs, kept from row to row. One per thread; used by one Sampler
// call at a time. What scales with the vocabulary is one value per block of it, and the candidates,
// which reach the vocabulary's size only if a request keeps that many of them.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/candidates.h"
#include "engine/logit_view.h"

namespace batchcore {

class SamplerScratch {
 private:
  friend class Sampler;

  std::vector<TokenLogit> overrides_;
  std::vector<std::uint32_t> starts_;
  std::vector<float> maxima_;  // per block
  std::vector<float> masses_;  // per block
  std::vector<float> nth_;
  std::vector<Candidate> candidates_;
  BlockBuffer buffer_{};
};

}  // namespace batchcore
