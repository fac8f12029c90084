#include <algorithm>
#include <utility>

#include "core/planner.h"

namespace batchcore {
namespace {

// In streams, idle slots between busy ones that are filled rather than cut out, until the step cost
// says what a second call takes in rows.
constexpr std::int32_t kUsualGap = 3;

}  // namespace

void Planner::build_micro_batches() {
  find_fillable();
  if (!decoding_.empty()) add_decoding();
  add_drafts();
  if (unified_) add_prompts_beside();
  for (PlannedMicroBatch& batch : plan_.micro_batches) fill_up(batch);
  if (!unified_) add_prompts_around();
  for (PlannedMicroBatch& batch : plan_.micro_batches) add_outputs(batch);
}

// One call for all: prompt rows use the weights that are read for the decode rows anyway. Where
// that makes attention slow (BackendInfo::attention_tile), prompts get a call of their own.
void Planner::add_prompts_beside() {
  auto num_rows = static_cast<std::int32_t>(decoding_.size());
  for (const PlannedRows& rows : prefill_) num_rows += rows.count;
  bool is_apart = plan_.micro_batches.empty() || num_rows > most_joint_rows();
  for (const PlannedRows& rows : prefill_) {
    if (std::exchange(is_apart, false)) plan_.micro_batches.emplace_back();
    plan_.micro_batches.back().rows.push_back(rows);
  }
}

// Streams are split into rectangles, so that a prompt beside others only makes more, smaller calls:
// each gets its own, but for the token that rides in the call that decodes. That call comes behind
// them, as the token is behind those of the prompt's own call; but before those whose forks take
// slots, on which it may have dummy rows.
void Planner::add_prompts_around() {
  std::vector<PlannedMicroBatch> calls;
  for (const PlannedRows& rows : prefill_) {
    const std::int32_t count = num_planned(rows.sequence) - (rides(rows.sequence) ? 1 : 0);
    if (count == 0) continue;
    auto& where = rows.sequence->num_forks > 0 ? plan_.micro_batches : calls;
    where.emplace_back();
    where.back().rows.push_back({rows.sequence, count});
  }
  plan_.micro_batches.insert(plan_.micro_batches.begin(), calls.begin(), calls.end());
}

// Rows of several sequences that one call takes at most before their attention becomes dear.
std::int32_t Planner::most_joint_rows() const {
  const std::int32_t tile = unified_ ? state_.info.attention_tile : 0;
  return tile > 0 ? std::max(tile - state_.info.row_group, 1) : state_.info.n_ubatch;
}

void Planner::add_decoding() {
  std::sort(decoding_.begin(), decoding_.end(),
            [this](const Sequence* a, const Sequence* b) { return slot_of(a) < slot_of(b); });
  const auto count = static_cast<std::int32_t>(decoding_.size());
  const std::int32_t num_calls = (count + most_joint_rows() - 1) / most_joint_rows();
  const std::int32_t per_call =
      next_multiple((count + num_calls - 1) / num_calls, state_.info.row_group);
  SeqId before = -1;
  for (std::int32_t i = 0; i < count; ++i) {
    if (i % per_call == 0) plan_.micro_batches.emplace_back();
    PlannedMicroBatch& batch = plan_.micro_batches.back();
    Sequence* sequence = decoding_[static_cast<std::size_t>(i)];
    const SeqId slot = slot_of(sequence);
    if (!unified_ && before >= 0) bridge_gap(batch, before, slot);
    batch.rows.push_back({sequence, 1});
    before = slot;
  }
}

// A dummy row may go where it can be taken back: on an empty slot, or behind a prefix of a memory
// that can be cut back. In streams the next token of a prompt may take its place.
void Planner::find_fillable() {
  const bool can_cut = !state_.serves_whole_slots_only();
  const auto num_slots = static_cast<std::size_t>(state_.info.num_slots);
  fillable_.assign(num_slots, 0);
  rider_.assign(num_slots, nullptr);
  for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
    const KvTree::SlotState holds = state_.kv.state(slot);
    fillable(slot) =
        holds == KvTree::SlotState::kFree || (holds == KvTree::SlotState::kCached && can_cut &&
                                              state_.kv.length(slot) < state_.info.cells_per_slot);
  }
  for (const SeqId slot : removed_) fillable(slot) = 1;
  for (Sequence* sequence : state_.running) {
    if (is_preempted(sequence)) continue;
    fillable(sequence->slot) = 0;
    if (!sequence->is_decoding()) add_rider(sequence);
  }
  for (const Admission& admission : plan_.admissions) fillable(admission.slot) = 0;
  for (const PlannedRows& rows : prefill_) add_rider(rows.sequence);
}

void Planner::add_rider(Sequence* sequence) {
  if (!unified_ && sequence->num_forks == 0) rider(slot_of(sequence)) = sequence;
}

// llama.cpp cuts a batch over streams wherever the ids have a gap, and reads all weights once
// more for each piece.
void Planner::bridge_gap(PlannedMicroBatch& batch, SeqId before, SeqId after) {
  const std::int32_t gap = after - before - 1;
  std::int32_t num_riders = 0;
  for (SeqId slot = before + 1; slot < after; ++slot) {
    if (!is_fillable(slot)) return;
    num_riders += rider(slot) == nullptr ? 0 : 1;
  }
  if (state_.cost.is_ready() ? !state_.cost.is_cheaper_than_a_call(gap, num_riders)
                             : gap > kUsualGap) {
    return;
  }
  for (SeqId slot = before + 1; slot < after; ++slot) add_filler(batch, slot);
}

void Planner::add_filler(PlannedMicroBatch& batch, SeqId slot) {
  fillable(slot) = 0;
  if (Sequence* sequence = std::exchange(rider(slot), nullptr); sequence != nullptr) {
    batch.rows.push_back({sequence, 1});
    riding_.push_back(sequence);
    return;
  }
  batch.filler_slots.push_back(slot);
  planned_cells_ += unified_ ? 1 : 0;
}

// If a whole group of rows is faster, a call that only decodes gets dummy rows up to that. In
// streams rows then go back into the order of their slots.
void Planner::fill_up(PlannedMicroBatch& batch) {
  auto count = static_cast<std::int32_t>(batch.filler_slots.size());
  for (const PlannedRows& rows : batch.rows) {
    if (unified_ && !is_last(rows)) return;
    // Streams would be cut where a dummy row is beside sequences that have more.
    if (!unified_ && rows.num_drafts > 0) return;
    count += rows.count + rows.num_drafts;
  }
  for (const SeqId slot : slots_to_fill(batch, fillers_wanted(batch, count))) {
    add_filler(batch, slot);
  }
  std::sort(batch.filler_slots.begin(), batch.filler_slots.end());
  if (unified_) return;
  std::sort(batch.rows.begin(), batch.rows.end(),
            [this](const PlannedRows& a, const PlannedRows& b) {
              return slot_of(a.sequence) < slot_of(b.sequence);
            });
}

// If kernels take rows in groups, a call with tokens of prompts gets logits that no request needs,
// so that the output head has whole groups, too. If each sequence has one row, the head gets all
// rows.
void Planner::add_outputs(PlannedMicroBatch& batch) {
  if (state_.info.row_group == 1) return;
  auto count = static_cast<std::int32_t>(batch.filler_slots.size());
  std::int32_t outputs = count;
  bool is_rectangle = true;
  for (const PlannedRows& rows : batch.rows) {
    count += rows.count + rows.num_drafts;
    outputs += rows.num_drafts + (is_last(rows) ? 1 : 0);
    is_rectangle = is_rectangle && rows.count == 1;
  }
  const std::int32_t wanted = is_rectangle ? count : preferred(outputs);
  if (outputs == 0 || wanted > state_.info.max_outputs) return;
  batch.num_extra_outputs = std::min(wanted, count) - outputs;
}

// Dummy rows that a call of `rows` rows, all with logits, had better have; 0 where there is no
// place for all of them.
std::int32_t Planner::fillers_wanted(const PlannedMicroBatch& batch, std::int32_t rows) const {
  const std::int32_t wanted = preferred(rows) - rows;
  if (rows + wanted > std::min(state_.info.max_outputs, most_joint_rows())) return 0;
  return slots_to_fill(batch, wanted).empty() ? 0 : wanted;
}

std::int32_t Planner::pending_after_admission(const Sequence* sequence) const {
  for (const Admission& admission : plan_.admissions) {
    if (admission.sequence != sequence) continue;
    return sequence->num_tokens() - std::max(admission.prefix_length, sequence->num_saved);
  }
  return sequence->num_pending();
}

bool Planner::rides(const Sequence* sequence) const {
  return std::find(riding_.begin(), riding_.end(), sequence) != riding_.end();
}

// Tokens of a prompt that the step computes. The one that rides is one more than the chunk, which
// has a size that suits the kernels, unless the chunk is all that is left.
std::int32_t Planner::num_planned(const Sequence* sequence) const {
  const auto chunk = std::find_if(prefill_.begin(), prefill_.end(), [&](const PlannedRows& rows) {
    return rows.sequence == sequence;
  });
  const std::int32_t count = chunk == prefill_.end() ? 0 : chunk->count;
  return std::min(count + (rides(sequence) ? 1 : 0), pending_after_admission(sequence));
}

// Whether the step samples a token behind these rows.
bool Planner::is_last(const PlannedRows& rows) const {
  const std::int32_t pending = pending_after_admission(rows.sequence);
  if (!rides(rows.sequence)) return rows.count == pending;
  return rows.count == 1 && num_planned(rows.sequence) == pending;
}

// Places for `wanted` dummy rows, or none: with fewer the call would have a shape that nobody asked
// for. In streams next to the busy slots, so that ids stay free of gaps.
std::vector<SeqId> Planner::slots_to_fill(const PlannedMicroBatch& batch,
                                          std::int32_t wanted) const {
  std::vector<SeqId> slots;
  const auto is_short = [&] { return static_cast<std::int32_t>(slots.size()) < wanted; };
  if (unified_) {
    if (free_cells() < wanted) return {};
    for (SeqId slot = 0; slot < state_.info.num_slots && is_short(); ++slot) {
      if (is_fillable(slot)) slots.push_back(slot);
    }
  } else {
    SeqId above = slot_of(batch.rows.back().sequence) + 1;
    SeqId below = slot_of(batch.rows.front().sequence) - 1;
    for (; is_short() && above < state_.info.num_slots && is_fillable(above); ++above) {
      slots.push_back(above);
    }
    for (; is_short() && below >= 0 && is_fillable(below); --below) slots.push_back(below);
  }
  return is_short() ? std::vector<SeqId>{} : slots;
}

SeqId Planner::slot_of(const Sequence* sequence) const {
  if (sequence->slot >= 0) return sequence->slot;
  for (const Admission& admission : plan_.admissions) {
    if (admission.sequence == sequence) return admission.slot;
  }
  return -1;
}

}  // namespace batchcore
