// From submit to the waiting queue.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/errors.h"
#include "engine/engine.h"
#include "engine/notifier.h"

namespace batchcore {
namespace {

double deadline_of(double now, const std::optional<double>& timeout_s) {
  return timeout_s ? now + *timeout_s : std::numeric_limits<double>::infinity();
}

}  // namespace

void Engine::validate(const RequestSpec& spec) const {
  const auto num_prompt = static_cast<std::int64_t>(spec.prompt.size());
  if (num_prompt == 0) throw InvalidRequestError("the prompt has no tokens");
  for (const Token token : spec.prompt) {
    if (token < 0 || token >= state_.info.n_vocab) {
      throw InvalidRequestError("prompt token " + std::to_string(token) +
                                " is not in the vocabulary of " +
                                std::to_string(state_.info.n_vocab));
    }
  }
  if (num_prompt > state_.info.cells_per_slot) {
    throw PromptTooLongError("the prompt has " + std::to_string(num_prompt) +
                                 " tokens, a sequence of this engine holds " +
                                 std::to_string(state_.info.cells_per_slot),
                             num_prompt, state_.info.cells_per_slot);
  }
  if (spec.sampling.n > config_.scheduler.max_num_seqs) {
    throw InvalidRequestError(
        "n = " + std::to_string(spec.sampling.n) +
        " is more than max_num_seqs = " + std::to_string(config_.scheduler.max_num_seqs));
  }
  const std::int32_t most = scheduler_.tiers().most_of(scheduler_.tiers().group_of(spec.priority));
  if (spec.sampling.n > most) {
    throw InvalidRequestError("n = " + std::to_string(spec.sampling.n) + " is more than the " +
                              std::to_string(most) + " slots that tier " +
                              std::to_string(spec.priority) + " may have");
  }
  if (std::isnan(spec.timeout_s.value_or(0.0)) || std::isnan(spec.queue_timeout_s.value_or(0.0))) {
    throw InvalidRequestError("a timeout is not a number");
  }
  const auto in_vocab = [this](Token token) { return token >= 0 && token < state_.info.n_vocab; };
  for (const Token token : spec.sampling.stop_token_ids) {
    if (!in_vocab(token)) {
      throw InvalidRequestError("stop token " + std::to_string(token) +
                                " is not in the vocabulary");
    }
  }
  if (spec.pins && spec.sampling.n > 1) {
    throw InvalidRequestError("a request that keeps its prompt has one completion");
  }
  if (spec.pins && !config_.scheduler.prefix_caching) {
    throw InvalidRequestError("a prefix can be kept only where prefixes are cached at all");
  }
  for (const auto& [token, bias] : spec.sampling.logit_bias) {
    if (!in_vocab(token)) {
      throw InvalidRequestError("logit_bias names token " + std::to_string(token) +
                                ", which is not in the vocabulary");
    }
  }
}

std::shared_ptr<RequestChannel> Engine::submit(RequestSpec spec) {
  std::vector<RequestSpec> one;
  one.push_back(std::move(spec));
  return submit_all(std::move(one), false).front();
}

std::vector<std::shared_ptr<RequestChannel>> Engine::submit_all(std::vector<RequestSpec> specs,
                                                                bool in_lock_step) {
  check_process();
  std::shared_ptr<StaticBatch> batch;
  if (in_lock_step) batch = std::make_shared<StaticBatch>();
  std::int32_t num_pins = 0;
  for (const RequestSpec& spec : specs) {
    validate(spec);
    num_pins += spec.pins ? 1 : 0;
    if (in_lock_step) batch->size += spec.sampling.n;
  }
  const double now = clock_();
  std::vector<std::unique_ptr<EngineRequest>> requests;
  std::vector<const RequestSpec*> asked;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (RequestSpec& spec : specs) {
    auto request = std::make_unique<EngineRequest>();
    request->spec = std::move(spec);
    request->batch = batch;
    request->metrics.arrival_s = now;
    request->deadline = deadline_of(now, request->spec.timeout_s);
    request->queue_deadline = deadline_of(now, request->spec.queue_timeout_s);
    asked.push_back(&request->spec);
    requests.push_back(std::move(request));
  }
  channels.reserve(requests.size());

  std::unique_lock lock(inbox_mutex_);
  require_open();
  load_.require_room(asked);
  require_pins(num_pins);
  for (auto& request : requests) {
    request->id = next_id_++;
    request->channel = std::make_shared<RequestChannel>(request->id, request->spec.notifier);
    channels.push_back(request->channel);
  }
  for (const auto& request : requests) {
    if (request->spec.pins) pin_requests_.insert(request->id);
  }
  inbox_.requests.reserve(inbox_.requests.size() + requests.size());
  for (const RequestSpec* spec : asked) load_.add(*spec);
  // From here on nothing throws.
  num_open_ += static_cast<std::int64_t>(requests.size());
  for (auto& request : requests) inbox_.requests.push_back(std::move(request));
  lock.unlock();
  inbox_ready_.notify_one();
  return channels;
}

// Holds inbox_mutex_. Half of the slots stay for everybody else.
void Engine::require_pins(std::int32_t num_pins) const {
  const std::int32_t most = std::max(1, state_.info.num_slots / 2);
  const auto num_kept = static_cast<std::int32_t>(pin_requests_.size());
  if (num_pins > 0 && num_kept + num_pins > most) {
    throw InvalidRequestError("this engine can keep " + std::to_string(most) +
                              " prefixes, and does");
  }
}

void Engine::take_in() {
  Inbox inbox;
  {
    const std::lock_guard lock(inbox_mutex_);
    std::swap(inbox, inbox_);
    state_.is_paused = is_paused_;
    load_.set_rate(queue_rate_);
  }
  for (auto& request : inbox.requests) accept(std::move(request));
  for (const RequestId id : inbox.aborts) {
    const auto found = requests_.find(id);
    if (found != requests_.end()) finish_request(*found->second, FinishReason::kCancelled);
  }
  for (const RequestId id : inbox.unpins) {
    const auto found = std::find_if(pins_.begin(), pins_.end(),
                                    [id](const auto& pinned) { return pinned.second == id; });
    if (found != pins_.end()) drop_pin(found->first);
  }
}

void Engine::accept(std::unique_ptr<EngineRequest> request) {
  const RequestSpec& spec = request->spec;
  const auto num_prompt = static_cast<std::int32_t>(spec.prompt.size());
  request->user = state_.waiting.enter(spec.user);
  for (std::int32_t index = 0; index < spec.sampling.n; ++index) {
    auto sequence = std::make_unique<EngineSequence>(*request, spec, index, *vocab_);
    sequence->request_id = request->id;
    sequence->rank = {spec.priority, request->id, index};
    sequence->user = request->user;
    sequence->arrived_at = request->metrics.arrival_s;
    sequence->deadline = std::min(request->deadline, request->queue_deadline);
    sequence->tier_group = scheduler_.tiers().group_of(spec.priority);
    sequence->num_prompt_tokens = num_prompt;
    // The last token that is sampled needs no cell of its own.
    sequence->max_tokens_total = static_cast<std::int32_t>(
        std::min<std::int64_t>(std::int64_t{num_prompt} + spec.sampling.max_tokens,
                               std::int64_t{state_.info.cells_per_slot} + 1));
    sequence->delta.index = index;
    sequence->batch = request->batch.get();
    request->sequences.push_back(std::move(sequence));
  }
  EngineSequence& leader = *request->sequences.front();
  leader.tokens = spec.prompt;
  leader.num_forks = spec.sampling.n - 1;
  request->num_unfinished = spec.sampling.n;
  // By when it came, however long a step it came in.
  state_.waiting.push(&leader, request->metrics.arrival_s);
  if (request->spec.timeout_s) deadlines_.emplace(request->deadline, request->id);
  if (request->spec.queue_timeout_s) queue_deadlines_.emplace(request->queue_deadline, request->id);
  requests_.emplace(request->id, std::move(request));
}

void Engine::expire(double now) {
  for (auto* deadlines : {&deadlines_, &queue_deadlines_}) {
    while (!deadlines->empty() && deadlines->begin()->first <= now) {
      finish_request(*requests_.at(deadlines->begin()->second), FinishReason::kTimeout);
    }
  }
}

void Engine::leave_queue(EngineRequest& request) {
  if (std::exchange(request.was_admitted, true)) return;
  if (request.spec.queue_timeout_s) queue_deadlines_.erase({request.queue_deadline, request.id});
  {
    const std::lock_guard lock(inbox_mutex_);
    load_.remove(request.spec);
  }
  tell_room_watchers();
}

void Engine::require_open() const {
  if (closing_) throw EngineClosedError("the engine is closed");
  if (is_draining_) {
    throw EngineClosedError("the engine is being drained: it takes no more requests");
  }
}

bool Engine::has_room(const QueueDemand& demand) const {
  check_process();
  const std::lock_guard lock(inbox_mutex_);
  require_open();
  return load_.has_room(demand);
}

bool Engine::wait_for_room(const QueueDemand& demand, double seconds) {
  check_process();
  std::unique_lock lock(inbox_mutex_);
  return room_changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    require_open();
    return load_.has_room(demand);
  });
}

bool Engine::wait_until_idle(double seconds) {
  check_process();
  std::unique_lock lock(inbox_mutex_);
  return room_changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                                [this] { return num_open_ == 0; });
}

void Engine::watch_room(const std::shared_ptr<Notifier>& notifier) {
  const std::lock_guard lock(inbox_mutex_);
  if (std::find(room_watchers_.begin(), room_watchers_.end(), notifier) == room_watchers_.end()) {
    room_watchers_.push_back(notifier);
  }
}

void Engine::tell_room_watchers() {
  std::vector<std::shared_ptr<Notifier>> watchers;
  {
    const std::lock_guard lock(inbox_mutex_);
    watchers.swap(room_watchers_);
  }
  room_changed_.notify_all();
  for (const auto& notifier : watchers) {
    notifier->mark(kRoomNews);
    notifier->wake();
  }
}

}  // namespace batchcore
