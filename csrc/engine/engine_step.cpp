// Carrying out a plan: memory first, then one decode call per micro-batch with sampling behind it.
#include <algorithm>
#include <span>
#include <string>
#include <utility>

#include "core/errors.h"
#include "core/queue_cursor.h"
#include "engine/engine.h"

namespace batchcore {

std::vector<RequestId> Engine::run_step() {
  take_in();
  pack_slots();
  const double start = clock_();
  observe_queue(start);
  expire(start);
  state_.now = start;
  state_.waiting.age(start);
  propose_drafts();
  const StepPlan plan = scheduler_.plan(state_);
  stats_.seconds.plan += clock_() - start;
  state_.step += 1;
  stats_.num_steps += plan.micro_batches.empty() ? 0 : 1;
  if (plan.empty() && !state_.waiting.empty() && idle_until() <= start) {
    // Can't happen while a slot holds the longest sequence; waiting for it forever would be worse.
    EngineSequence& head = of(QueueCursor(state_.waiting).next());
    finish_request(*head.request, FinishReason::kError,
                   std::make_exception_ptr(EngineError("the request can't be scheduled")));
  }
  for (Sequence* sequence : plan.preemptions) {
    const bool is_parked =
        std::find(plan.parked.begin(), plan.parked.end(), sequence) != plan.parked.end();
    preempt(of(sequence), is_parked);
  }
  for (const SeqId slot : plan.evictions) evict(slot);
  for (const Admission& admission : plan.admissions) admit(admission);
  stats_.num_slot_preemptions += plan.num_slot_preemptions;
  run_micro_batches(plan);
  update_batch_size();
  if (!plan.micro_batches.empty()) {
    stats_.step_tokens.record(stats_.step_decode_rows + stats_.step_prefill_tokens);
  }
  did_wait_ = !state_.waiting.empty() && idle_until() <= start;
  if (config_.check_integrity) check_integrity();
  publish(true);
  return std::exchange(published_, {});
}

// Time in which nobody waited, or for something else than room, says nothing about the queue.
void Engine::observe_queue(double now) {
  if (did_wait_ && !state_.is_paused) {
    queue_rate_.observe(now - last_step_at_, num_admitted_, admitted_tokens_);
  }
  last_step_at_ = now;
  num_admitted_ = 0;
  admitted_tokens_ = 0;
}

void Engine::update_batch_size() {
  constexpr std::uint64_t kKneeSteps = 64;  // a fit moves a little with every step
  if (!config_.scheduler.adaptive) return;
  if (state_.step % kKneeSteps == 0 && state_.cost.is_ready()) {
    batch_size_.set_knee(
        throughput_knee(state_.cost.coefficients(), kv_per_row_, config_.scheduler.max_num_seqs));
  }
  state_.batch_size_limit = batch_size_.limit();
}

void Engine::admit(const Admission& admission) {
  EngineSequence& sequence = of(admission.sequence);
  EngineRequest& request = *sequence.request;
  state_.waiting.erase(&sequence);
  sequence.slot = admission.slot;
  adopt_prefix(admission);
  if (admission.host != nullptr) restore_prefix(admission);
  if (sequence.num_saved > 0) restore(sequence);
  sequence.num_computed = state_.kv.length(sequence.slot);
  const auto place =
      std::upper_bound(state_.running.begin(), state_.running.end(), &sequence,
                       [](const Sequence* a, const Sequence* b) { return a->rank < b->rank; });
  state_.running.insert(place, &sequence);
  if (request.was_admitted) return;
  leave_queue(request);
  request.metrics.admitted_s = clock_();
  stats_.latencies.queue.record(request.metrics.admitted_s - request.metrics.arrival_s);
  num_admitted_ += 1;
  admitted_tokens_ += sequence.num_prompt_tokens;
  state_.waiting.charge(sequence.user, config_.scheduler.queue.fair_share.prompt_token_cost *
                                           (sequence.num_prompt_tokens - sequence.num_computed));
  request.metrics.num_cached_tokens = sequence.num_computed;
  stats_.num_prompt_tokens += sequence.num_prompt_tokens;
  stats_.num_cached_tokens += sequence.num_computed;
}

void Engine::run_micro_batches(const StepPlan& plan) {
  if (plan.micro_batches.empty()) return;
  stats_.step_decode_rows = stats_.step_prefill_tokens = 0;
  stats_.step_s = 0.0;
  std::vector<PlannedRows> together;
  for (const PlannedMicroBatch& planned : plan.micro_batches) {
    if (&planned != &plan.micro_batches.front()) {
      // Who is cancelled or too late by now is not computed any further.
      take_in();
      expire(clock_());
    }
    together.clear();
    for (const PlannedRows& rows : planned.rows) {
      if (!of(rows.sequence).is_suspect) {
        together.push_back(rows);
      } else if (!closing_) {
        run_micro_batch(std::span(&rows, 1), {});
      }
    }
    if (closing_) return;
    run_micro_batch(together,
                    together.size() == planned.rows.size() ? planned : PlannedMicroBatch{});
    if (&planned != &plan.micro_batches.back()) publish(false);
  }
}

void Engine::run_micro_batch(std::span<const PlannedRows> rows, const PlannedMicroBatch& extras) {
  std::vector<PlannedRows> live;
  live.reserve(rows.size());
  StepWork work;
  batch_.clear();
  sampled_rows_.clear();
  drafted_slots_.clear();
  // Among the others by slot: streams are cut where ids do not ascend one by one.
  auto filler = extras.filler_slots.begin();
  const auto add_fillers_below = [&](SeqId slot) {
    for (; filler != extras.filler_slots.end() && *filler < slot; ++filler) {
      batch_.add(0, state_.kv.length(*filler), *filler, true);
    }
  };
  for (const PlannedRows& planned : rows) {
    EngineSequence& sequence = of(planned.sequence);
    if (sequence.is_finished || sequence.slot < 0) continue;
    const std::int32_t count = std::min(planned.count, sequence.num_pending());
    // Alone after a failure, it is not the drafts that are looked into.
    const std::int32_t num_drafts = sequence.is_suspect ? 0 : planned.num_drafts;
    add_fillers_below(sequence.slot);
    for (std::int32_t i = 0; i < count; ++i) {
      const Position position = sequence.num_computed + i;
      const bool is_last = position + 1 == sequence.num_tokens();
      if (is_last) {
        sampled_rows_.push_back(
            {&sequence, static_cast<std::int32_t>(batch_.size()), num_drafts, 0});
      }
      batch_.add(sequence.tokens[static_cast<std::size_t>(position)], position, sequence.slot,
                 is_last);
      work.kv_tokens += position;
    }
    for (std::int32_t i = 0; i < num_drafts; ++i) {
      const Position position = sequence.num_tokens() + i;
      batch_.add(sequence.draft.tokens[static_cast<std::size_t>(i)], position, sequence.slot, true);
      work.kv_tokens += position;
    }
    if (num_drafts > 0) drafted_slots_.push_back(sequence.slot);
    (sequence.is_decoding() ? work.decode_rows : work.prefill_tokens) += count + num_drafts;
    live.push_back({&sequence, count, num_drafts});
  }
  if (live.empty()) return;
  add_fillers_below(state_.info.num_slots);
  batch_.add_outputs(extras.num_extra_outputs);
  const std::int32_t num_prefill_tokens = work.prefill_tokens;
  const std::int32_t num_decode_rows = work.decode_rows;
  // One token of a prompt beside others costs what a row that decodes does.
  if (std::all_of(live.begin(), live.end(),
                  [](const PlannedRows& one) { return one.count == 1; })) {
    work.decode_rows += std::exchange(work.prefill_tokens, 0);
  }

  const double start = clock_();
  const DecodeStatus status = decode(live);
  const double seconds = clock_() - start;
  stats_.seconds.decode += seconds;
  forget_fillers(extras);
  if (status != DecodeStatus::kOk) {
    handle_failure(live, status);
    return;
  }
  drafts_pause_ = drafted_slots_.empty() ? drafts_pause_ : 0;
  if (work.prefill_tokens == 0) {
    const double attention = state_.cost.coefficients()[3] * static_cast<double>(work.kv_tokens);
    if (static_cast<std::size_t>(batch_.num_outputs) == batch_.size()) {
      state_.call_times.observe(batch_.num_outputs, seconds - attention);
    }
    kv_per_row_ += 0.1 * (static_cast<double>(work.kv_tokens) / work.decode_rows - kv_per_row_);
  }
  state_.cost.observe(work, seconds);
  stats_.num_micro_batches += 1;
  stats_.num_rows += static_cast<std::int64_t>(batch_.size());
  stats_.num_prefill_tokens += num_prefill_tokens;
  stats_.num_decode_rows += num_decode_rows;
  stats_.num_filler_rows += static_cast<std::int64_t>(extras.filler_slots.size());
  stats_.step_prefill_tokens += num_prefill_tokens;
  stats_.step_decode_rows += num_decode_rows;
  stats_.step_s += seconds;
  count_padding(live, extras);
  advance(live);
  sample_rows();
  cut_drafts_off();
}

void Engine::count_padding(std::span<const PlannedRows> rows, const PlannedMicroBatch& extras) {
  const AttentionShape shape = backend_->attention_shape(batch_);
  for (const Position position : batch_.positions) {
    stats_.attention_computed += shape.computed(position);
  }
  stats_.num_extra_outputs += extras.num_extra_outputs;
  std::vector<const StaticBatch*> counted;
  for (const PlannedRows& planned : rows) {
    const EngineSequence& sequence = of(planned.sequence);
    RequestMetrics& metrics = sequence.request->metrics;
    std::int64_t needed = 0;
    std::int64_t computed = 0;
    const std::int32_t num_rows = planned.count + planned.num_drafts;
    for (std::int32_t i = 0; i < num_rows; ++i) {
      needed += shape.needed(sequence.num_computed + i);
      computed += shape.computed(sequence.num_computed + i);
    }
    stats_.attention_needed += needed;
    metrics.attention_needed += needed;
    metrics.attention_computed += computed;
    stats_.num_draft_tokens += planned.num_drafts;
    // Once per step and batch: in lock-step all of its members are in one call.
    const StaticBatch* batch = sequence.batch;
    if (batch == nullptr || !sequence.has_started) continue;
    if (std::find(counted.begin(), counted.end(), batch) != counted.end()) continue;
    counted.push_back(batch);
    stats_.idle_slot_steps += batch->num_ended;
  }
}

DecodeStatus Engine::decode(std::span<const PlannedRows> rows) {
  {
    const std::lock_guard lock(in_flight_mutex_);
    for (const PlannedRows& planned : rows) {
      const RequestId id = planned.sequence->request_id;
      if (in_flight_.empty() || in_flight_.back() != id) in_flight_.push_back(id);
    }
  }
  DecodeStatus status = DecodeStatus::kComputeFailed;
  try {
    status = backend_->decode(batch_);
  } catch (const std::exception&) {  // a Backend of somebody else's; ours throw nothing
  }
  const std::lock_guard lock(in_flight_mutex_);
  in_flight_.clear();
  return status;
}

// The memory may hold any prefix of the failed batch: it is cut back to what is accounted for. From
// then on each sequence of the batch is computed alone, until that succeeds; the one that fails
// alone is at fault, and nobody else pays for it.
void Engine::handle_failure(std::span<const PlannedRows> rows, DecodeStatus status) {
  for (const PlannedRows& planned : rows) reconcile(of(planned.sequence));
  if (status == DecodeStatus::kInterrupted) {  // whoever is left computes the same again
    stats_.num_interrupts += 1;
    return;
  }
  stats_.num_decode_failures += 1;
  if (excuse_drafts(status)) return;
  const std::string reason = backend_->last_error();
  if (status == DecodeStatus::kNoSlot && evict_all()) return;
  if (status == DecodeStatus::kComputeFailed) rebuild_backend();
  for (const PlannedRows& planned : rows) {
    EngineSequence& sequence = of(planned.sequence);
    if (!std::exchange(sequence.is_suspect, true)) continue;
    if (status == DecodeStatus::kNoSlot && state_.running.size() > 1 &&
        sequence.num_preemptions < scheduler_.config().max_preemptions) {
      // Our account says that there is room, but some memories need more than it knows (windows
      // whose cells are shared). It goes on when others have ended.
      preempt(sequence, false);
      continue;
    }
    const int code = static_cast<int>(status);
    std::string message =
        "the model could not compute this request (status " + std::to_string(code) + ")";
    if (!reason.empty()) message += ": " + reason;
    finish_request(*sequence.request, FinishReason::kError,
                   std::make_exception_ptr(DecodeError(message, code)));
  }
}

void Engine::advance(std::span<const PlannedRows> rows) {
  for (const PlannedRows& planned : rows) {
    Sequence& sequence = *planned.sequence;
    const std::span tokens(sequence.tokens);
    state_.kv.append(sequence.slot, tokens.subspan(static_cast<std::size_t>(sequence.num_computed),
                                                   static_cast<std::size_t>(planned.count)));
    sequence.num_computed += planned.count;
    of(&sequence).is_suspect = false;
    state_.last_used[static_cast<std::size_t>(sequence.slot)] = state_.step;
  }
}

// A prompt that is computed is where its sibling completions start, from the same row of logits.
void Engine::start_forks() {
  const std::size_t num_leaders = sampled_rows_.size();
  for (std::size_t i = 0; i < num_leaders; ++i) {
    const auto [leader, row, num_drafts, num_right] = sampled_rows_[i];
    if (leader->num_forks == 0) continue;
    fork(*leader);
    for (const auto& sibling : leader->request->sequences) {
      if (sibling.get() != leader && sibling->num_computed == leader->num_computed) {
        sampled_rows_.push_back({sibling.get(), row, 0, 0});
      }
    }
  }
}

// In rounds: one token of each sequence, then one more of each whose token is the one that was
// drafted. So a sampler sees what came before as it would without drafts, and several sequences
// are sampled at the same time.
void Engine::sample_rows() {
  std::vector<SampleJob> jobs;
  double start = clock_();
  start_forks();
  while (!sampled_rows_.empty()) {
    samples_.assign(sampled_rows_.size(), SampledToken{});
    jobs.clear();
    jobs.reserve(sampled_rows_.size());
    for (std::size_t i = 0; i < sampled_rows_.size(); ++i) {
      const float* logits = backend_->logits(sampled_rows_[i].row);
      if (logits == nullptr) continue;
      jobs.push_back({&sampled_rows_[i].sequence->sampler, logits, &samples_[i]});
    }
    samplers_.run(jobs);
    const double sampled = clock_();
    stats_.seconds.sample += sampled - start;
    std::size_t num_left = 0;
    for (std::size_t i = 0; i < sampled_rows_.size(); ++i) {
      const SampledRow row = sampled_rows_[i];
      const Token token = samples_[i].token;
      add_token(*row.sequence, samples_[i], sampled);
      if (!goes_on_with_draft(row, token)) continue;
      sampled_rows_[num_left++] = {row.sequence, row.row + 1, row.num_drafts - 1,
                                   row.num_right + 1};
    }
    sampled_rows_.resize(num_left);
    start = clock_();
    stats_.seconds.text += start - sampled;
  }
}

}  // namespace batchcore
