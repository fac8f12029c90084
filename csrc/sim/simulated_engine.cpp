#include "sim/simulated_engine.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <utility>

#include "core/errors.h"
#include "sim/sim_prompt.h"

namespace batchcore {
namespace {

// What is generated is of no interest, so there is little to choose from.
constexpr std::int32_t kNumLogits = 2;
// An engine that has work and changes nothing for so many steps never will.
constexpr int kMaxIdleSteps = 1000;

std::shared_ptr<const Vocab> sim_vocab() {
  auto vocab = std::make_shared<Vocab>();
  for (std::int32_t token = 0; token < kNumLogits; ++token) vocab->add_piece("");
  return vocab;
}

std::unique_ptr<SimBackend> sim_backend(const SimOptions& options) {
  const SimCost& cost = options.cost;
  for (const double seconds : {cost.base_s, cost.prefill_token_s, cost.decode_row_s,
                               cost.kv_token_s, cost.loose_row_s, cost.copied_token_s}) {
    if (!(seconds >= 0.0 && std::isfinite(seconds))) {
      throw ConfigError("a cost of a simulated device must be a number of at least 0 seconds");
    }
  }
  // Time has to pass for every step, or an engine that has work would never reach what comes next.
  if (cost.base_s + std::min(cost.prefill_token_s, cost.decode_row_s) <= 0.0) {
    throw ConfigError("a simulated device must take time: base_s is 0, and so is a cost per row");
  }
  BackendInfo info = options.backend;
  info.n_vocab = kSimVocabSize;
  return std::make_unique<SimBackend>(info, cost, kNumLogits);
}

// The engine takes 0 for a time that was not reached.
double reached(double seconds) { return seconds == 0.0 ? SimOutcome::kNotReached : seconds; }

std::optional<double> timeout(double seconds) {
  return std::isinf(seconds) ? std::nullopt : std::optional(seconds);
}

}  // namespace

SimulatedEngine::SimulatedEngine(const SimOptions& options)
    : max_wait_s_(options.engine.scheduler.max_wait_s),
      engine_(
          [&] {
            auto owned = sim_backend(options);
            backend_ = owned.get();
            return owned;
          }(),
          sim_vocab(), options.engine, [this] { return clock(); }) {
  for (const std::string& name : options.users) number_of(name);
}

std::int32_t SimulatedEngine::user(const std::string& name) {
  const std::lock_guard lock(mutex_);
  return number_of(name);
}

std::int32_t SimulatedEngine::number_of(const std::string& name) {
  const auto number = static_cast<std::int32_t>(users_.size());
  const auto [entry, is_new] = user_numbers_.try_emplace(name, number);
  if (is_new) users_.push_back(name);
  return entry->second;
}

// A request that came while a step ran is submitted behind it, but has come when it came. Time
// starts a hair above 0, see reached().
double SimulatedEngine::clock() const {
  return std::max(arrival_ < 0.0 ? backend_->now() : arrival_, DBL_MIN);
}

bool SimulatedEngine::submit(const SimRequest& request) {
  const std::lock_guard lock(mutex_);
  return submit_one(request);
}

void SimulatedEngine::replay(std::span<const SimRequest> requests) {
  const std::lock_guard lock(mutex_);
  for (const SimRequest& request : requests) submit_one(request);
}

bool SimulatedEngine::submit_one(const SimRequest& request) {
  check(request);
  if (request.arrival_s < reached_) {
    throw InvalidRequestError("a simulated request arrives at " +
                              std::to_string(request.arrival_s) + " s, before the " +
                              std::to_string(reached_) + " s that were reached");
  }
  if (users_.empty()) number_of("");
  if (request.user < 0 || static_cast<std::size_t>(request.user) >= users_.size()) {
    throw InvalidRequestError("there is no user number " + std::to_string(request.user));
  }
  advance(request.arrival_s);
  RequestSpec spec;
  spec.prompt = sim_prompt(request);
  spec.sampling.max_tokens = request.num_output_tokens;
  spec.sampling.ignore_eos = true;
  spec.priority = request.priority;
  spec.user = users_[static_cast<std::size_t>(request.user)];
  spec.timeout_s = timeout(request.timeout_s);
  spec.queue_timeout_s = timeout(request.queue_timeout_s);
  SimOutcome outcome;
  outcome.arrival_s = request.arrival_s;
  Open open;
  arrival_ = request.arrival_s;
  try {
    open.channel = engine_.submit(std::move(spec));
  } catch (const QueueFullError&) {
    outcome.finished_s = request.arrival_s;
    outcome.end = static_cast<std::int32_t>(SimEnd::kRefused);
  } catch (...) {
    arrival_ = -1.0;
    throw;
  }
  // The engine adds to the very same number.
  const double arrival = std::exchange(arrival_, -1.0);
  const std::size_t index = outcomes_.size();
  outcomes_.push_back(outcome);
  if (open.channel == nullptr) return false;
  open.index = index;
  open.num_tokens = std::int64_t{request.num_prompt_tokens} + request.num_output_tokens;
  open.deadline = std::max(arrival, DBL_MIN) + request.timeout_s;
  open.queue_deadline = std::max(arrival, DBL_MIN) + request.queue_timeout_s;
  load_.num_requests += 1;
  load_.num_tokens += open.num_tokens;
  open_.emplace(open.channel->id(), std::move(open));
  return true;
}

void SimulatedEngine::run_until(double time) {
  const std::lock_guard lock(mutex_);
  if (!std::isfinite(time)) throw InvalidRequestError("a time to run to must be finite");
  advance(time);
}

bool SimulatedEngine::run_all(std::int64_t max_steps) {
  const std::lock_guard lock(mutex_);
  for (; engine_.has_work() && max_steps > 0; --max_steps) step(kForever);
  reached_ = std::max(reached_, backend_->now());
  return !engine_.has_work();
}

void SimulatedEngine::advance(double time) {
  while (engine_.has_work() && backend_->now() < time) step(time);
  if (!engine_.has_work()) backend_->advance_to(time);
  reached_ = std::max(reached_, time);
}

void SimulatedEngine::step(double limit) {
  const double before = backend_->now();
  const std::vector<RequestId> ended = engine_.step();
  for (const RequestId id : ended) collect(id);
  if (backend_->now() > before || !ended.empty()) {
    num_idle_steps_ = 0;
    return;
  }
  const double next = std::min(next_event(), limit);
  if (next > before && std::isfinite(next)) {
    backend_->advance_to(next);
    num_idle_steps_ = 0;
  } else if (++num_idle_steps_ > kMaxIdleSteps) {
    throw EngineError("the simulated engine has work, but does none of it");
  }
}

// Where a step computes nothing, the batch is held back to fill: whoever is open waits, and they
// are fewer than may run. Then it goes on when the one that came first has waited long enough, or
// one is too late.
double SimulatedEngine::next_event() const {
  const double now = clock();
  double next = kForever;
  for (const auto& [id, open] : open_) {
    const double arrival = std::max(outcomes_[open.index].arrival_s, DBL_MIN);
    for (const double time : {arrival + max_wait_s_, open.deadline, open.queue_deadline}) {
      if (time > now) next = std::min(next, time);
    }
  }
  return next;
}

void SimulatedEngine::collect(RequestId id) {
  const auto found = open_.find(id);
  if (found == open_.end()) return;
  const std::optional<RequestUpdate> update = found->second.channel->take();
  if (!update || !update->finished) return;
  const RequestMetrics& metrics = update->metrics;
  SimOutcome& outcome = outcomes_[found->second.index];
  outcome.admitted_s = reached(metrics.admitted_s);
  outcome.first_token_s = reached(metrics.first_token_s);
  outcome.finished_s = reached(metrics.finished_s);
  outcome.num_cached_tokens = metrics.num_cached_tokens;
  outcome.num_preemptions = metrics.num_preemptions;
  for (const CompletionDelta& delta : update->deltas) {
    outcome.num_output_tokens += static_cast<std::int32_t>(delta.token_ids.size());
    if (delta.finish_reason) outcome.end = static_cast<std::int32_t>(*delta.finish_reason);
  }
  load_.num_requests -= 1;
  load_.num_tokens -= found->second.num_tokens;
  open_.erase(found);
}

double SimulatedEngine::now() const {
  const std::lock_guard lock(mutex_);
  return backend_->now();
}

SimLoad SimulatedEngine::load() const {
  const std::lock_guard lock(mutex_);
  return load_;
}

std::vector<SimOutcome> SimulatedEngine::outcomes() const {
  const std::lock_guard lock(mutex_);
  return outcomes_;
}

std::size_t SimulatedEngine::num_outcomes() const {
  const std::lock_guard lock(mutex_);
  return outcomes_.size();
}

void SimulatedEngine::reserve(std::size_t num_requests) {
  const std::lock_guard lock(mutex_);
  outcomes_.reserve(outcomes_.size() + num_requests);
}

}  // namespace batchcore
