// From tokens to what callers see: text, terminal states, publishing, counters.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/errors.h"
#include "engine/engine.h"
#include "engine/notifier.h"

namespace batchcore {

void Engine::add_token(EngineSequence& sequence, SampledToken& sampled, double now) {
  EngineRequest& request = *sequence.request;
  if (sequence.is_finished) return;
  if (!sampled.valid()) {
    finish_request(request, FinishReason::kError,
                   std::make_exception_ptr(EngineError(
                       "no token can be chosen: the model's logits are not numbers, or every token "
                       "is forbidden")));
    return;
  }
  const Token token = sampled.token;
  if (request.metrics.first_token_s == 0.0) {
    request.metrics.first_token_s = now;
    stats_.latencies.ttft.record(now - request.metrics.arrival_s);
  }
  const double before = std::exchange(sequence.last_token_s, now);
  if (before >= 0.0) {
    stats_.latencies.itl.record(now - before);
    batch_size_.observe(now - before, static_cast<std::int32_t>(state_.running.size()));
  }
  stats_.num_generated_tokens += 1;
  state_.waiting.charge(sequence.user, config_.scheduler.queue.fair_share.output_token_cost);
  if (sequence.batch != nullptr) {
    stats_.busy_slot_steps += 1;
    if (!std::exchange(sequence.has_started, true)) sequence.batch->num_started += 1;
  }
  const StopCause cause = sequence.sampler.stop_cause(token);
  sequence.tokens.push_back(token);
  sequence.sampler.accept(token);
  sequence.delta.token_ids.push_back(token);
  if (sampled.logprobs) sequence.delta.logprobs.push_back(*std::move(sampled.logprobs));
  mark_news(request);
  if (cause == StopCause::kNone) {
    add_text(sequence, token);
    return;
  }
  finish(sequence, FinishReason::kStop,
         cause == StopCause::kStopToken ? StopReason(token) : StopReason());
}

void Engine::add_text(EngineSequence& sequence, Token token) {
  const SamplingParams& sampling = sequence.request->spec.sampling;
  std::string text;
  sequence.detokenizer.push(token, text);
  if (sequence.num_generated() < sampling.min_tokens) {
    sequence.delta.text += text;  // stop strings count from min_tokens on, like stop tokens
  } else if (const auto match = sequence.stops.push(text, sequence.delta.text)) {
    finish(sequence, FinishReason::kStop, sampling.stop[*match]);
    return;
  }
  if (sequence.num_tokens() >= sequence.max_tokens_total) finish(sequence, FinishReason::kLength);
}

void Engine::flush_text(EngineSequence& sequence) {
  std::string tail;
  sequence.detokenizer.finish(tail);
  if (!sequence.stops.push(tail, sequence.delta.text)) sequence.stops.finish(sequence.delta.text);
}

void Engine::finish(EngineSequence& sequence, FinishReason reason, StopReason why) {
  if (sequence.is_finished) return;
  EngineRequest& request = *sequence.request;
  sequence.is_finished = true;
  // Behind a stop string there is nothing more to say.
  if (!std::holds_alternative<std::string>(why)) flush_text(sequence);
  sequence.delta.finish_reason = reason;
  sequence.delta.stop_reason = std::move(why);
  if (reason == FinishReason::kStop || reason == FinishReason::kLength) {
    state_.history.record(sequence.num_generated());
  }
  if (sequence.batch != nullptr) {
    if (!std::exchange(sequence.has_started, true)) sequence.batch->num_started += 1;
    sequence.batch->num_ended += 1;
  }
  state_.waiting.erase(&sequence);
  release_slot(sequence);
  drop_saved(sequence);
  mark_news(request);
  request.num_unfinished -= 1;
  if (request.num_unfinished > 0) return;
  leave_queue(request);
  if (request.spec.pins && !is_pinned(request.id)) {
    const std::lock_guard lock(inbox_mutex_);
    pin_requests_.erase(request.id);
  }
  if (request.spec.timeout_s) deadlines_.erase({request.deadline, request.id});
  state_.waiting.leave(request.user);
  request.metrics.finished_s = clock_();
  if (reason == FinishReason::kStop || reason == FinishReason::kLength) {
    stats_.latencies.e2e.record(request.metrics.finished_s - request.metrics.arrival_s);
  }
  stats_.num_finished[static_cast<std::size_t>(reason)] += 1;
}

void Engine::finish_request(EngineRequest& request, FinishReason reason, std::exception_ptr error) {
  if (request.num_unfinished == 0) return;
  request.error = std::move(error);
  for (const auto& sequence : request.sequences) finish(*sequence, reason);
}

// The cells stay as a cached prefix until somebody needs them or the slot.
void Engine::release_slot(EngineSequence& sequence) {
  if (sequence.slot < 0) return;
  std::erase(state_.running, &sequence);
  if (config_.scheduler.prefix_caching && state_.kv.length(sequence.slot) > 0) {
    state_.kv.set_cached(sequence.slot);
    if (sequence.request->spec.pins && sequence.num_generated() > 0) {
      pin(*sequence.request, sequence.slot);
    }
  } else {
    backend_->remove(sequence.slot, 0, -1);
    state_.kv.remove(sequence.slot);
  }
  sequence.slot = -1;
}

void Engine::pin(EngineRequest& request, SeqId slot) {
  state_.pinned[static_cast<std::size_t>(slot)] = true;
  pins_.emplace(slot, request.id);
}

bool Engine::is_pinned(RequestId id) const {
  return std::any_of(pins_.begin(), pins_.end(),
                     [id](const auto& pinned) { return pinned.second == id; });
}

void Engine::drop_pin(SeqId slot) {
  const auto pin = pins_.extract(slot);
  if (pin.empty()) return;
  state_.pinned[static_cast<std::size_t>(slot)] = false;
  const std::lock_guard lock(inbox_mutex_);
  pin_requests_.erase(pin.mapped());
}

void Engine::mark_news(EngineRequest& request) {
  if (std::exchange(request.has_news, true)) return;
  news_.push_back(&request);
}

// After each call of a step, so that nobody waits for a call that others need. Whoever is done
// stays until the step ends, since the plan names its sequences.
void Engine::publish(bool ends_step) {
  if (!ends_step && news_.empty()) return;
  const double start = clock_();
  // Before the channels: who sees a request end must find it in the counters.
  if (ends_step) update_stats();
  std::vector<EngineRequest*> kept;
  std::vector<std::shared_ptr<Notifier>> notifiers;
  for (EngineRequest* request : news_) {
    const bool done = request->num_unfinished == 0;
    if (done && !ends_step) {
      kept.push_back(request);
      continue;
    }
    request->has_news = false;
    if (!done && !request->spec.streams) continue;
    RequestUpdate update;
    for (const auto& sequence : request->sequences) {
      CompletionDelta& delta = sequence->delta;
      if (delta.token_ids.empty() && delta.text.empty() && !delta.finish_reason) continue;
      update.deltas.push_back(std::exchange(delta, CompletionDelta{}));
      delta.index = sequence->rank.index;
    }
    update.finished = done;
    update.error = request->error;
    update.metrics = request->metrics;
    if (done && (num_open_ -= 1) == 0) tell_room_watchers();
    request->channel->publish(std::move(update));
    if (std::find(published_.begin(), published_.end(), request->id) == published_.end()) {
      published_.push_back(request->id);
    }
    const std::shared_ptr<Notifier>& notifier = request->spec.notifier;
    if (notifier != nullptr &&
        std::find(notifiers.begin(), notifiers.end(), notifier) == notifiers.end()) {
      notifiers.push_back(notifier);
    }
    if (done) requests_.erase(request->id);
  }
  news_ = std::move(kept);
  for (const auto& notifier : notifiers) notifier->wake();
  stats_.seconds.publish += clock_() - start;
}

void Engine::update_stats() {
  stats_.num_running = static_cast<std::int32_t>(state_.running.size());
  stats_.num_waiting = static_cast<std::int32_t>(state_.waiting.size());
  stats_.num_cells = state_.info.num_cells;
  stats_.num_active_cells = state_.kv.num_active_cells();
  stats_.num_cached_cells = state_.kv.num_cells() - state_.kv.num_active_cells();
  stats_.num_pinned = static_cast<std::int32_t>(pins_.size());
  stats_.saved_bytes = static_cast<std::int64_t>(saved_bytes_);
  stats_.host_cache_bytes = static_cast<std::int64_t>(state_.host.num_bytes());
  stats_.cost_s = state_.cost.coefficients();
  stats_.variant_operations = backend_->variant_operations();
  stats_.num_graphs_reused = backend_->num_graphs_reused();
  stats_.num_active_users = static_cast<std::int32_t>(state_.waiting.users().num_active());
  stats_.service = state_.waiting.users().service();
  stats_.num_known_users = static_cast<std::int32_t>(state_.waiting.users().num_known());
  stats_.batch_size_limit = std::min(config_.scheduler.max_num_seqs, state_.batch_size_limit);
  stats_.batch_size_knee = batch_size_.knee();
  stats_.num_batch_size_increases = batch_size_.num_increases();
  stats_.num_batch_size_decreases = batch_size_.num_decreases();
  count_tiers();
  const std::lock_guard lock(stats_mutex_);
  published_stats_ = stats_;
}

// Both are in the order of priorities.
void Engine::count_tiers() {
  stats_.num_tiers = 0;
  auto waiting = state_.waiting.by_priority().begin();
  auto running = state_.running.begin();
  const auto has_waiting = [&] { return waiting != state_.waiting.by_priority().end(); };
  const auto has_running = [&] { return running != state_.running.end(); };
  for (TierCount& tier : stats_.tiers) {
    if (!has_waiting() && !has_running()) return;
    const bool waits_first =
        !has_running() || (has_waiting() && waiting->first < (*running)->rank.priority);
    tier = {waits_first ? waiting->first : (*running)->rank.priority, 0, 0};
    if (has_waiting() && waiting->first == tier.priority) {
      tier.num_waiting = static_cast<std::int32_t>((waiting++)->second);
    }
    for (; has_running() && (*running)->rank.priority == tier.priority; ++running) {
      tier.num_running += 1;
    }
    stats_.num_tiers += 1;
  }
}

void Engine::check_integrity() const {
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  };
  demand(!requests_.empty() || saved_bytes_ == 0, "host memory is held for nobody");
  if (const auto problem = state_.kv.check_integrity()) throw std::logic_error(*problem);
  // A long queue is not recounted in every step.
  if (state_.waiting.size() <= 64 || state_.step % 64 == 0) {
    if (const auto problem = state_.waiting.check_integrity()) throw std::logic_error(*problem);
  }
  demand(queue_deadlines_.size() <= requests_.size() && deadlines_.size() <= requests_.size(),
         "a deadline is kept for nobody");
  std::int32_t num_active = 0;
  for (SeqId slot = 0; slot < state_.info.num_slots; ++slot) {
    num_active += state_.kv.state(slot) == KvTree::SlotState::kActive ? 1 : 0;
    const std::int32_t length = state_.kv.length(slot);
    demand(backend_->pos_max(slot) == length - 1,
           "the model's memory and the account of it differ");
    // The layers with the shortest memory still hold what the next token attends to.
    const Position first = backend_->pos_min(slot);
    const std::int32_t window = state_.info.window > 0 ? state_.info.window : length;
    demand(state_.serves_whole_slots_only() || length == 0 ||
               first <= std::max(0, length - window + 1),
           "the model's memory has lost positions that are needed");
    demand(!state_.pinned[static_cast<std::size_t>(slot)] ||
               state_.kv.state(slot) == KvTree::SlotState::kCached,
           "a pinned slot is in use");
  }
  demand(num_active == static_cast<std::int32_t>(state_.running.size()),
         "a slot is held by no running sequence");
  demand(state_.info.layout != KvLayout::kUnified || state_.kv.num_cells() <= state_.info.num_cells,
         "more cells are in use than there are");
  for (const Sequence* sequence : state_.running) {
    demand(state_.kv.length(sequence->slot) == sequence->num_computed,
           "a sequence has computed other tokens than its slot holds");
  }
}

}  // namespace batchcore
