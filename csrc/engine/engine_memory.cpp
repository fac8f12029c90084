// What happens to KV memory beside the decode calls: giving way, prefixes, forks, and putting it
// right after a failure.
#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/slot_packing.h"
#include "engine/engine.h"

namespace batchcore {

void Engine::preempt(EngineSequence& sequence, bool keeps_cells) {
  if (keeps_cells && sequence.num_computed > 0) {
    // It finds them again as any request finds its prefix, where nobody needed them meanwhile.
    state_.kv.set_cached(sequence.slot);
  } else {
    save(sequence);
    backend_->remove(sequence.slot, 0, -1);
    state_.kv.remove(sequence.slot);
  }
  std::erase(state_.running, &sequence);
  sequence.slot = -1;
  sequence.num_computed = 0;
  sequence.num_shared = 0;
  sequence.is_suspect = false;
  sequence.draft.clear();
  sequence.num_preemptions += 1;
  sequence.request->metrics.num_preemptions += 1;
  stats_.num_preemptions += 1;
  state_.waiting.push(&sequence, state_.now);
}

// Copies the cells to host memory where that is allowed, has room and pays.
void Engine::save(EngineSequence& sequence) {
  if (sequence.num_computed == 0) return;
  const std::size_t bytes = backend_->saved_size(sequence.slot);
  if (bytes == 0 || saved_bytes_ + bytes > config_.max_saved_bytes) return;
  if (!saving_pays(scheduler_.config().preemption, sequence.num_computed, bytes, state_.cost,
                   state_.copy_speed)) {
    return;
  }
  const double start = clock_();
  sequence.saved_state.resize(bytes);
  const std::size_t written = backend_->save(sequence.slot, sequence.saved_state);
  saved_bytes_ += bytes;
  if (written == 0) {
    drop_saved(sequence);
    return;
  }
  state_.copy_speed.observe(bytes, clock_() - start);
  sequence.num_saved = sequence.num_computed;
  stats_.num_saves += 1;
}

// Where the copy can't be restored, the sequence computes its tokens again.
void Engine::restore(EngineSequence& sequence) {
  const double start = clock_();
  if (backend_->restore(sequence.slot, sequence.saved_state)) {
    state_.copy_speed.observe(sequence.saved_state.size(), clock_() - start);
    state_.kv.append(
        sequence.slot,
        std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.num_saved)));
  }
  drop_saved(sequence);
}

void Engine::drop_saved(EngineSequence& sequence) {
  saved_bytes_ -= sequence.saved_state.size();
  sequence.saved_state = {};
  sequence.num_saved = 0;
}

void Engine::evict(SeqId slot) {
  save_prefix(slot);
  drop_pin(slot);
  backend_->remove(slot, 0, -1);
  state_.kv.remove(slot);
  stats_.num_evictions += 1;
}

// To the host tier, where that is cheaper than to compute the prefix again and nobody else holds
// it.
void Engine::save_prefix(SeqId slot) {
  const std::size_t room = state_.host.max_bytes();
  if (room == 0) return;
  HostCache::Entry entry{state_.kv.tokens(slot), {}};
  const bool whole_only = state_.serves_whole_slots_only();
  const auto length = static_cast<std::int32_t>(entry.tokens.size());
  if (state_.kv.cells_freed_by(std::span(&slot, 1)) == 0) return;
  const HostCache::Match known = state_.host.longest_match(entry.tokens, whole_only);
  if (known.length == length) return;
  const std::size_t bytes = backend_->saved_size(slot);
  if (bytes == 0 || bytes > room) return;
  const PreemptionMode mode = scheduler_.config().preemption == PreemptionMode::kSave
                                  ? PreemptionMode::kSave
                                  : PreemptionMode::kAuto;
  if (state_.cost.is_ready() && !saving_pays(mode, length, bytes, state_.cost, state_.copy_speed)) {
    return;
  }
  const double start = clock_();
  entry.state.resize(bytes);
  if (backend_->save(slot, entry.state) == 0) return;
  state_.copy_speed.observe(bytes, clock_() - start);
  state_.host.put(std::move(entry), whole_only);
}

// Where the state can't be restored, or not be cut back to what is wanted, the sequence computes
// its prompt.
void Engine::restore_prefix(const Admission& admission) {
  const HostCache::Entry& entry = *admission.host;
  const SeqId slot = admission.slot;
  const double start = clock_();
  state_.host.touch(admission.host);
  if (!backend_->restore(slot, entry.state)) return;
  state_.copy_speed.observe(entry.state.size(), clock_() - start);
  if (!backend_->remove(slot, admission.prefix_length, -1)) {
    backend_->remove(slot, 0, -1);
    return;
  }
  const auto length = static_cast<std::size_t>(admission.prefix_length);
  state_.kv.append(slot, std::span(entry.tokens).first(length));
  stats_.num_host_tokens += admission.prefix_length;
}

// Gives the new slot what is already computed of its sequence. Where the backend can't after all (a
// window that has moved on), the sequence computes it.
void Engine::adopt_prefix(const Admission& admission) {
  const SeqId slot = admission.slot;
  Sequence& sequence = *admission.sequence;
  if (admission.prefix_slot == slot) {
    state_.kv.set_active(slot);
    if (state_.kv.length(slot) == admission.prefix_length) return;
    const bool kept = backend_->remove(slot, admission.prefix_length, -1);
    if (!kept) backend_->remove(slot, 0, -1);
    state_.kv.truncate(slot, kept ? admission.prefix_length : 0);
    return;
  }
  state_.kv.open(slot);
  if (admission.prefix_slot < 0) return;
  state_.last_used[static_cast<std::size_t>(admission.prefix_slot)] = state_.step;
  if (!backend_->copy(admission.prefix_slot, slot, admission.prefix_length)) return;
  state_.kv.share(admission.prefix_slot, slot, admission.prefix_length);
  sequence.num_shared = admission.prefix_length;
}

// Sequences close ranks while nobody waits for the slots between them.
void Engine::pack_slots() {
  const std::optional<SlotSwap> swap = choose_swap(state_);
  if (!swap) return;
  const SeqId from = swap->sequence->slot;
  const std::size_t bytes = backend_->saved_size(from) + backend_->saved_size(swap->to);
  if (swap_pays(*swap->sequence, bytes, state_.cost, state_.copy_speed)) {
    exchange_slots(from, swap->to);
  }
}

// Through host memory, so that a cached prefix that lies there is kept. What can't be restored is
// lost to the slot and computed again.
void Engine::exchange_slots(SeqId a, SeqId b) {
  const double start = clock_();
  std::vector<std::uint8_t> states[2];
  for (const auto& [slot, state] : {std::pair{a, &states[0]}, std::pair{b, &states[1]}}) {
    if (state_.kv.length(slot) == 0) continue;
    state->resize(backend_->saved_size(slot));
    if (backend_->save(slot, *state) == 0) return;
  }
  backend_->remove(a, 0, -1);
  backend_->remove(b, 0, -1);
  state_.kv.swap(a, b);
  for (Sequence* sequence : state_.running) {
    if (sequence->slot == a || sequence->slot == b) sequence->slot = sequence->slot == a ? b : a;
  }
  const auto in = [](auto& by_slot, SeqId slot) { return by_slot.begin() + slot; };
  std::iter_swap(in(state_.last_used, a), in(state_.last_used, b));
  std::iter_swap(in(state_.pinned, a), in(state_.pinned, b));
  auto pin_a = pins_.extract(a);
  auto pin_b = pins_.extract(b);
  if (pin_a) pins_.emplace(b, pin_a.mapped());
  if (pin_b) pins_.emplace(a, pin_b.mapped());
  stats_.num_slot_moves += 1;
  restore_slot(b, states[0]);
  restore_slot(a, states[1]);
  state_.copy_speed.observe(2 * (states[0].size() + states[1].size()), clock_() - start);
}

void Engine::restore_slot(SeqId slot, std::span<const std::uint8_t> state) {
  if (state.empty() || backend_->restore(slot, state)) return;
  for (Sequence* sequence : state_.running) {
    if (sequence->slot == slot) forget(of(sequence));
  }
  if (state_.kv.state(slot) == KvTree::SlotState::kCached) {
    drop_pin(slot);
    state_.kv.remove(slot);
  }
}

void Engine::forget_fillers(const PlannedMicroBatch& extras) {
  for (const SeqId slot : extras.filler_slots) {
    backend_->remove(slot, state_.kv.length(slot), -1);
  }
}

void Engine::reconcile(EngineSequence& sequence) {
  const Position held = backend_->pos_max(sequence.slot) + 1;
  if (held == sequence.num_computed) return;
  if (held > sequence.num_computed && backend_->remove(sequence.slot, sequence.num_computed, -1)) {
    return;
  }
  backend_->remove(sequence.slot, 0, -1);
  forget(sequence);
}

// The cells of a running sequence are gone; it computes its tokens again.
void Engine::forget(EngineSequence& sequence) {
  state_.kv.truncate(sequence.slot, 0);
  sequence.num_computed = 0;
  sequence.num_shared = 0;
}

// False where there was nothing to evict.
bool Engine::evict_all() {
  bool any = false;
  for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
    if (state_.kv.state(slot) != KvTree::SlotState::kCached) continue;
    evict(slot);
    any = true;
  }
  return any;
}

// After a failure of the device nothing that it holds can be trusted.
void Engine::rebuild_backend() {
  if (!backend_->rebuild()) return;
  stats_.num_rebuilds += 1;
  evict_all();
  for (Sequence* sequence : state_.running) forget(of(sequence));
}

// The prompt is computed: the sibling completions start from a copy of its cells, and their first
// tokens are drawn from the same row of logits.
void Engine::fork(EngineSequence& leader) {
  leader.num_forks = 0;
  for (const auto& sibling : leader.request->sequences) {
    if (sibling.get() == &leader || sibling->is_finished) continue;
    sibling->tokens = leader.tokens;
    sibling->lift = leader.lift;
    const SeqId slot = Scheduler::choose_slot(state_);
    if (state_.kv.state(slot) == KvTree::SlotState::kCached) evict(slot);
    state_.kv.open(slot);
    sibling->slot = slot;
    if (backend_->copy(leader.slot, slot, -1)) {
      state_.kv.share(leader.slot, slot, leader.num_computed);
      sibling->num_computed = leader.num_computed;
      sibling->num_shared = leader.num_computed;
    }
    const auto place =
        std::upper_bound(state_.running.begin(), state_.running.end(), sibling.get(),
                         [](const Sequence* a, const Sequence* b) { return a->rank < b->rank; });
    state_.running.insert(place, sibling.get());
  }
}

}  // namespace batchcore
