// Picks the tokens of a row that can still be chosen, without sorting the row. Stateless; any
// thread.
//
// Everywhere one token comes before another if its logit is larger or, at equal logits, its id
// lower.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/types.h"
#include "engine/logit_view.h"

namespace batchcore {

struct Candidate {
  float logit = 0.0F;
  float weight = 0.0F;  ///< unnormalised probability
  Token token = -1;
};

[[nodiscard]] inline bool comes_before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

/// Appends the tokens with low < logit <= high, ascending by id. `maxima` are the blocks' largest
/// values: a block with none above `low` isn't read.
void gather(const LogitView& view, std::span<const float> maxima, float low, float high,
            std::vector<Candidate>& into);

/// Replaces `into` by the first `count` tokens of the row in order; fewer where fewer have a logit
/// above kNoLogit. Weights are not set.
void select_top(const LogitView& view, std::span<const float> maxima, std::size_t count,
                std::vector<float>& scratch, std::vector<Candidate>& into);

/// Moves the shortest run of first candidates whose weights add up to `mass` (> 0) to the front and
/// returns its length; all of them where they add up to less. Expected linear time.
std::size_t keep_mass(std::span<Candidate> candidates, double mass);

}  // namespace batchcore
