// Speculation: tokens that are guessed, computed together with the one before them, and kept as far
// as sampling comes to the same. Outputs are what they would be without.
#include <algorithm>
#include <span>

#include "core/speculation.h"
#include "engine/engine.h"

namespace batchcore {
namespace {

// After a call with drafts has failed there are none for so many steps, then twice as many, and so
// on.
constexpr std::uint64_t kFirstPause = 64;
constexpr std::uint64_t kLongestPause = std::uint64_t{1} << 20U;

}  // namespace

// Of every sequence that decodes, also where none will be computed: whether the first token is
// right is seen anyway. Static batches run in lock-step: a sequence of theirs gains one token per
// step. A prompt that others fork from must hold its own cells only.
void Engine::propose_drafts() {
  const std::int32_t wanted = config_.scheduler.num_speculative_tokens;
  if (wanted <= 0 || state_.serves_whole_slots_only()) return;
  const bool is_pausing = state_.step < drafts_from_step_;
  for (Sequence* sequence : state_.running) {
    sequence->draft.clear();
    if (is_pausing || !sequence->is_decoding() || sequence->num_forks > 0 ||
        sequence->batch != nullptr || of(sequence).is_suspect) {
      continue;
    }
    of(sequence).ngrams.propose(sequence->tokens, most_drafts(*sequence, state_.info, wanted),
                                sequence->draft);
  }
}

// `token` was just sampled from `row`. True where it is what was drafted, so that the next row,
// whose cells were computed for it, says what comes behind it.
bool Engine::goes_on_with_draft(const SampledRow& row, Token token) {
  EngineSequence& sequence = *row.sequence;
  const auto at = static_cast<std::size_t>(row.num_right);
  if (at >= sequence.draft.tokens.size() || token < 0) return false;
  const bool is_right = sequence.draft.tokens[at] == token;
  const std::int32_t match_length = sequence.draft.match_length + row.num_right;
  sequence.draft_rates.record(match_length, is_right);
  state_.draft_rates.record(match_length, is_right);
  if (!is_right || row.num_drafts == 0 || sequence.is_finished) return false;
  state_.kv.append(sequence.slot, std::span(&token, 1));
  sequence.num_computed += 1;
  stats_.num_accepted_tokens += 1;
  return true;
}

// What the memory holds behind the tokens that were kept. Slots of sequences that have ended on the
// way are empty or cached by now.
void Engine::cut_drafts_off() {
  for (const SeqId slot : drafted_slots_) {
    const std::int32_t length = state_.kv.length(slot);
    if (backend_->pos_max(slot) < length || backend_->remove(slot, length, -1)) continue;
    backend_->remove(slot, 0, -1);
    const auto holder =
        std::find_if(state_.running.begin(), state_.running.end(),
                     [slot](const Sequence* sequence) { return sequence->slot == slot; });
    if (holder != state_.running.end()) {
      forget(of(*holder));
    } else {
      drop_pin(slot);
      state_.kv.remove(slot);
    }
  }
}

// A call that might have succeeded without drafts is made again without, and costs nobody anything.
bool Engine::excuse_drafts(DecodeStatus status) {
  if (drafted_slots_.empty() || status == DecodeStatus::kComputeFailed) return false;
  drafts_pause_ = std::clamp(2 * drafts_pause_, kFirstPause, kLongestPause);
  drafts_from_step_ = state_.step + drafts_pause_;
  return true;
}

}  // namespace batchcore
