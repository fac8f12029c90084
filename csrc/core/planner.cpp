#include "core/planner.h"

#include <utility>

#include "core/batch_size.h"
#include "core/eviction.h"

namespace batchcore {
namespace {

// The least prefill chunks in tokens: decoding can't starve prefill. Where no target latency asks
// for less, chunks are so large that prefill loses little (docs/results/engine.md).
constexpr std::int32_t kMinChunkLatency = 16;
constexpr std::int32_t kMinChunkWithTarget = 64;
constexpr std::int32_t kMinChunk = 128;
// Steps with prefill may take this multiple of a step that decodes everybody who runs or waits for
// a free place, where no target is given.
constexpr double kDefaultSlowdown = 4.0;
// A prompt's last tokens, up to so many, get no step of their own.
constexpr std::int32_t kMaxLeftOver = 3;

std::int32_t min_chunk(const SchedulerConfig& config) {
  if (config.prefill_policy == PrefillPolicy::kLatency) return kMinChunkLatency;
  return config.target_itl_s > 0 ? kMinChunkWithTarget : kMinChunk;
}

}  // namespace

Planner::Planner(const SchedulerConfig& config, const TierLimits& tiers,
                 const SchedulerState& state)
    : config_(config),
      tiers_(tiers),
      state_(state),
      unified_(state.info.layout == KvLayout::kUnified) {
  running_by_group_.assign(static_cast<std::size_t>(tiers.num_groups()), 0);
  for (const Sequence* sequence : state.running) {
    count(*sequence, 1);
    kept_.push_back(sequence->slot);
  }
}

StepPlan Planner::plan(bool admits) {
  choose_decoding(true);
  const auto num_rows = unified_ ? static_cast<std::int32_t>(decoding_.size()) : 0;
  rows_left_ = state_.info.n_ubatch - num_rows;
  budget_ = prefill_budget();
  continue_prefill();
  if (admits) {
    admit();
    level_slots();
  }
  // A static batch that is larger than what fits would wait for itself.
  if (is_alone()) choose_decoding(false);
  build_micro_batches();
  return std::move(plan_);
}

std::int32_t Planner::free_cells() const {
  return state_.info.num_cells - state_.kv.num_cells() + state_.kv.cells_freed_by(removed_) -
         planned_cells_;
}

// Evicts cached prefixes, and where `requester` is given preempts sequences that rank behind it,
// until `cells` are free. False where that is not to be had; what was evicted stays evicted.
bool Planner::secure_cells(std::int32_t cells, const Sequence* requester) {
  if (!unified_) return true;  // a slot's own partition is as long as the longest sequence
  while (free_cells() < cells) {
    if (evict_one(false)) continue;
    if (requester == nullptr) return false;
    if (preempt_one_behind(*requester)) continue;
    // Pinned prefixes give way to the one sequence that could not go on otherwise.
    if (!is_only(*requester) || !evict_one(true)) return false;
  }
  return true;
}

// True where nobody else runs after this plan.
bool Planner::is_only(const Sequence& sequence) const {
  return std::all_of(state_.running.begin(), state_.running.end(), [&](const Sequence* other) {
    return other == &sequence || is_preempted(other);
  });
}

bool Planner::evict_one(bool even_pinned) {
  const SeqId slot = least_worth(state_, kept_, removed_, even_pinned);
  if (slot < 0) return false;
  plan_.evictions.push_back(slot);
  removed_.push_back(slot);
  return true;
}

// The sequence and the siblings that will fork from it.
void Planner::count(const Sequence& sequence, std::int32_t sign) {
  const std::int32_t size = 1 + sequence.num_forks;
  num_sequences_ += sign * size;
  running_by_group_[static_cast<std::size_t>(sequence.tier_group)] += sign * size;
}

void Planner::preempt(Sequence* victim, Cells cells) {
  plan_.preemptions.push_back(victim);
  if (cells == Cells::kKept) {
    plan_.parked.push_back(victim);
  } else {
    removed_.push_back(victim->slot);
  }
  count(*victim, -1);
  if (std::erase(decoding_, victim) > 0) planned_cells_ -= 1;
  std::erase_if(prefill_, [&](const PlannedRows& rows) {
    if (rows.sequence != victim) return false;
    planned_cells_ -= rows.count;
    budget_ += rows.count;
    rows_left_ += rows.count;
    return true;
  });
}

bool Planner::preempt_one_behind(const Sequence& requester) {
  Sequence* victim = nullptr;
  for (Sequence* candidate : state_.running) {
    if (candidate->rank <= requester.rank || is_preempted(candidate)) continue;
    const bool worn = candidate->num_preemptions >= config_.max_preemptions;
    const bool victim_worn =
        victim != nullptr && victim->num_preemptions >= config_.max_preemptions;
    if (victim == nullptr || worn < victim_worn ||
        (worn == victim_worn && victim->rank < candidate->rank)) {
      victim = candidate;
    }
  }
  if (victim == nullptr) return false;
  preempt(victim);
  return true;
}

// Every sequence that decodes is in every step; in rank order, so that a sequence which can't get
// a cell is always the last in rank.
void Planner::choose_decoding(bool in_lock_step) {
  for (Sequence* sequence : state_.running) {
    if (!sequence->is_decoding() || is_preempted(sequence)) continue;
    if (in_lock_step && sequence->has_started && sequence->batch->is_prefilling()) continue;
    if (secure_cells(1, sequence)) {
      decoding_.push_back(sequence);
      planned_cells_ += 1;
    } else {
      preempt(sequence);
    }
  }
}

// The most that is not above `count` and, together with `others`, is whole groups of rows.
std::int32_t Planner::whole_groups(std::int32_t count, std::int32_t others) const {
  const std::int32_t over = (count + others) % state_.info.row_group;
  return count > over ? count - over : count;
}

std::int32_t Planner::prefill_budget() const {
  const auto rows = static_cast<std::int32_t>(decoding_.size());
  const std::int32_t most = unified_ ? state_.info.n_ubatch - rows : state_.info.n_ubatch;
  if (rows == 0 || config_.prefill_policy == PrefillPolicy::kThroughput) return most;
  const std::int32_t floor = std::min(min_chunk(config_), most);
  if (!state_.cost.is_ready()) return whole_groups(floor, unified_ ? rows : 0);
  StepWork work{0, rows, 0};
  for (const Sequence* sequence : decoding_) work.kv_tokens += sequence->num_tokens();
  const double alone = state_.cost.seconds(work);
  double target =
      config_.target_itl_s > 0 ? config_.target_itl_s : usual_step(work) * kDefaultSlowdown;
  // Steps that prompts fill up to the target would tell it that no sequence more fits.
  if (config_.adaptive) target *= BatchSizeController::kGrowsBelow;
  const double per_token = state_.cost.seconds_per_prefill_token();
  const double left = per_token > 0 ? (target - alone) / per_token : most;
  const auto chunk = static_cast<std::int32_t>(std::clamp(left, 0.0, static_cast<double>(most)));
  return whole_groups(std::clamp(chunk, floor, most), unified_ ? rows : 0);
}

// Seconds of a step once everybody who has or gets a place decodes. Few decode while many prompts
// wait: a multiple of their own short step would keep the batch small for long.
double Planner::usual_step(const StepWork& now) const {
  const auto num_waiting = static_cast<std::int32_t>(
      std::min<std::size_t>(state_.waiting.size(), static_cast<std::size_t>(config_.max_num_seqs)));
  StepWork full;
  full.decode_rows =
      std::max(std::min(num_sequences_ + num_waiting, config_.max_num_seqs), now.decode_rows);
  full.kv_tokens = now.kv_tokens / now.decode_rows * full.decode_rows;
  return state_.cost.seconds(full);
}

// As many of the next pending tokens as the budget and the cells allow; 0 where none.
std::int32_t Planner::plan_chunk(Sequence* sequence, std::int32_t num_computed, bool may_preempt) {
  const std::int32_t remaining = sequence->num_tokens() - num_computed;
  std::int32_t count = std::min(remaining, budget_);
  if (count <= 0) return 0;
  // A first token is not put off by a step for the last few tokens of a prompt.
  if (remaining - count <= kMaxLeftOver && remaining <= rows_left_) count = remaining;
  if (unified_ && !secure_cells(count, may_preempt ? sequence : nullptr)) {
    count = std::min(count, free_cells());
    if (count <= 0) return 0;
  }
  planned_cells_ += count;
  budget_ -= count;
  rows_left_ -= count;
  prefill_.push_back({sequence, count});
  return count;
}

void Planner::continue_prefill() {
  for (Sequence* sequence : state_.running) {
    if (budget_ <= 0) return;
    if (sequence->is_decoding() || is_preempted(sequence)) continue;
    plan_chunk(sequence, sequence->num_computed, true);
  }
}

}  // namespace batchcore
