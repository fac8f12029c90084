#include <algorithm>
#include <vector>

#include "core/planner.h"
#include "core/speculation.h"

namespace batchcore {

// Drafts take what is left over when all else is planned: rows of a call that would be made anyway,
// and cells that nobody uses, until the step is done. Where prompts are computed, too, there is
// nothing left over: a draft's row would make others wait longer than the step's target allows.
void Planner::add_drafts() {
  if (config_.num_speculative_tokens <= 0 || decoding_.empty() || !prefill_.empty()) return;
  PlannedMicroBatch& batch = plan_.micro_batches.front();
  const auto num_rows = static_cast<std::int32_t>(batch.rows.size());
  // Streams are cut where sequences differ in their number of rows, and a dummy row is one.
  if (!unified_ && !batch.filler_slots.empty()) return;
  std::vector<DraftOffer> offers;
  offers.reserve(batch.rows.size());
  bool has_any = false;
  for (const PlannedRows& rows : batch.rows) {
    const Sequence& one = *rows.sequence;
    offers.push_back(make_offer(one.draft, one.num_tokens(), one.draft_rates, state_.draft_rates));
    has_any = has_any || offers.back().count > 0;
  }
  if (!has_any) return;
  DraftRoom room;
  room.plain_rows = num_rows + fillers_wanted(batch, num_rows);
  room.extra_rows = std::min(most_joint_rows(), state_.info.max_outputs) - num_rows;
  if (unified_) room.extra_rows = std::min(room.extra_rows, free_cells());
  room.row_group = state_.info.row_group;
  room.same_for_all = !unified_ && num_rows > 1;
  if (config_.target_itl_s > 0.0) room.longest_s = config_.target_itl_s;
  const std::vector<std::int32_t> drafts =
      choose_drafts(offers, room, state_.call_times, state_.cost);
  for (std::size_t i = 0; i < drafts.size(); ++i) {
    batch.rows[i].num_drafts = drafts[i];
    planned_cells_ += drafts[i];
  }
}

}  // namespace batchcore
