#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>

#include "core/errors.h"
#include "engine/notifier.h"

namespace batchcore {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Engine::Engine(std::unique_ptr<Backend> backend, std::shared_ptr<const Vocab> vocab,
               const EngineConfig& config, EngineClock clock)
    : backend_(std::move(backend)),
      vocab_(std::move(vocab)),
      config_(config),
      clock_(std::move(clock)),
      scheduler_(config.scheduler),
      process_(getpid()),
      state_(backend_->info()),
      samplers_(config.num_sampler_threads) {
  if (config.scheduler.max_num_seqs > state_.info.num_slots) {
    throw ConfigError("max_num_seqs is larger than the number of slots");
  }
  if (config.max_sequence_tokens > 0) {
    state_.info.cells_per_slot = std::min(state_.info.cells_per_slot, config.max_sequence_tokens);
  }
  state_.host.set_max_bytes(config.host_cache_bytes);
}

Engine::~Engine() { close(); }

void Engine::check_process() const {
  if (getpid() != process_) {
    throw EngineError(
        "this engine belongs to the process that made it: make a new one after fork, or start "
        "workers with the 'spawn' method");
  }
}

void Engine::start() {
  check_process();
  const std::lock_guard lock(close_mutex_);
  if (!thread_.joinable() && !closing_) thread_ = std::thread([this] { run(); });
}

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
  std::int64_t num_tokens = 0;
  std::int32_t num_pins = 0;
  for (const RequestSpec& spec : specs) {
    validate(spec);
    num_tokens += static_cast<std::int64_t>(spec.prompt.size());
    num_pins += spec.pins ? 1 : 0;
    if (in_lock_step) batch->size += spec.sampling.n;
  }
  const double now = clock_();
  std::vector<std::unique_ptr<EngineRequest>> requests;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (RequestSpec& spec : specs) {
    auto request = std::make_unique<EngineRequest>();
    request->spec = std::move(spec);
    request->batch = batch;
    request->metrics.arrival_s = now;
    request->deadline = request->spec.timeout_s ? now + *request->spec.timeout_s
                                                : std::numeric_limits<double>::infinity();
    requests.push_back(std::move(request));
  }
  channels.reserve(requests.size());

  std::unique_lock lock(inbox_mutex_);
  if (closing_) throw EngineClosedError("the engine is closed");
  require_room(static_cast<std::int64_t>(requests.size()), num_tokens, num_pins);
  for (auto& request : requests) {
    request->id = next_id_++;
    request->channel = std::make_shared<RequestChannel>(request->id, request->spec.notifier);
    channels.push_back(request->channel);
  }
  inbox_.requests.reserve(inbox_.requests.size() + requests.size());
  // From here on nothing throws.
  queued_requests_ += static_cast<std::int64_t>(requests.size());
  queued_tokens_ += num_tokens;
  num_pins_ += num_pins;
  num_open_ += static_cast<std::int64_t>(requests.size());
  for (auto& request : requests) inbox_.requests.push_back(std::move(request));
  lock.unlock();
  inbox_ready_.notify_one();
  return channels;
}

// Holds inbox_mutex_.
void Engine::require_room(std::int64_t num_requests, std::int64_t num_tokens,
                          std::int32_t num_pins) const {
  if (queued_requests_ + num_requests > config_.max_queued_requests) {
    throw QueueFullError(
        "the queue is full: " + std::to_string(queued_requests_) + " requests are waiting",
        config_.max_queued_requests);
  }
  // One request is always taken, however long, so that the bound can't make a valid one impossible.
  const bool is_first = queued_requests_ == 0 && num_requests == 1;
  if (!is_first && queued_tokens_ + num_tokens > config_.max_queued_tokens) {
    throw QueueFullError(
        "the queue is full: " + std::to_string(queued_tokens_) + " prompt tokens are waiting",
        config_.max_queued_tokens);
  }
  // Half of the slots stay for everybody else.
  const std::int32_t most = std::max(1, state_.info.num_slots / 2);
  if (num_pins > 0 && num_pins_ + num_pins > most) {
    throw InvalidRequestError("this engine can keep " + std::to_string(most) +
                              " prefixes, and does");
  }
}

void Engine::abort(RequestId id) {
  if (getpid() != process_) return;  // a copied handle that is collected in a forked child
  {
    const std::lock_guard lock(inbox_mutex_);
    if (closing_) return;
    inbox_.aborts.push_back(id);
  }
  inbox_ready_.notify_one();
  // A decode call that works for cancelled requests only is not worth its end. Held throughout, so
  // that no later call is hit.
  const std::lock_guard lock(in_flight_mutex_);
  if (std::erase(in_flight_, id) > 0 && in_flight_.empty()) backend_->interrupt();
}

void Engine::unpin(RequestId id) {
  if (getpid() != process_) return;
  {
    const std::lock_guard lock(inbox_mutex_);
    if (closing_) return;
    inbox_.unpins.push_back(id);
  }
  inbox_ready_.notify_one();
}

void Engine::run() {
  for (;;) {
    {
      std::unique_lock lock(inbox_mutex_);
      inbox_ready_.wait(lock, [this] { return closing_ || !inbox_.empty() || !requests_.empty(); });
      if (closing_) return;
    }
    const std::lock_guard step_lock(step_mutex_);
    try {
      run_step();
    } catch (const std::exception& error) {
      fail_for_good(error);
      return;
    }
  }
}

// A defect of ours, or a device that is lost: nothing about the state can be trusted, so nobody is
// left waiting for it.
void Engine::fail_for_good(const std::exception& error) {
  {
    const std::lock_guard lock(inbox_mutex_);
    closing_ = true;
  }
  fail_all(std::make_exception_ptr(EngineError(std::string("the engine failed: ") + error.what())));
}

std::vector<RequestId> Engine::step() {
  check_process();
  const std::lock_guard step_lock(step_mutex_);
  if (thread_.joinable()) throw EngineError("step() is for engines with autostart=False");
  {
    const std::lock_guard lock(inbox_mutex_);
    if (closing_) throw EngineClosedError("the engine is closed");
  }
  try {
    return run_step();
  } catch (const std::exception& error) {
    fail_for_good(error);
    throw;
  }
}

void Engine::take_in() {
  Inbox inbox;
  {
    const std::lock_guard lock(inbox_mutex_);
    std::swap(inbox, inbox_);
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
  for (std::int32_t index = 0; index < spec.sampling.n; ++index) {
    auto sequence = std::make_unique<EngineSequence>(*request, spec, index, *vocab_);
    sequence->request_id = request->id;
    sequence->rank = {spec.priority, request->id, index};
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
  state_.waiting.push(&leader);
  if (request->spec.timeout_s) deadlines_.emplace(request->deadline, request->id);
  requests_.emplace(request->id, std::move(request));
}

void Engine::expire(double now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    finish_request(*requests_.at(deadlines_.begin()->second), FinishReason::kTimeout);
  }
}

void Engine::fail_all(const std::exception_ptr& error) {
  take_in();
  std::vector<EngineRequest*> open;
  open.reserve(requests_.size());
  for (const auto& [id, request] : requests_) open.push_back(request.get());
  for (EngineRequest* request : open) finish_request(*request, FinishReason::kError, error);
  publish();
}

void Engine::close() {
  if (getpid() != process_) return;
  const std::lock_guard close_lock(close_mutex_);
  {
    const std::lock_guard lock(inbox_mutex_);
    closing_ = true;
  }
  inbox_ready_.notify_all();
  backend_->interrupt();
  if (thread_.joinable()) thread_.join();
  const std::lock_guard step_lock(step_mutex_);
  fail_all(std::make_exception_ptr(
      EngineClosedError("the engine was closed before the request was done")));
}

EngineStats Engine::stats() const {
  check_process();
  const std::lock_guard lock(stats_mutex_);
  return published_stats_;
}

}  // namespace batchcore
