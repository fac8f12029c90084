#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
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
      load_({config.max_queued_requests, config.max_queued_tokens,
             config.max_queued_requests_per_user, config.max_queued_tokens_per_user, config.shed}),
      state_(backend_->info(), config.scheduler.queue),
      batch_size_(config.scheduler.max_num_seqs,
                  config.scheduler.adaptive ? config.scheduler.target_itl_s : 0.0),
      samplers_(config.num_sampler_threads) {
  if (config.scheduler.max_num_seqs > state_.info.num_slots) {
    throw ConfigError("max_num_seqs is larger than the number of slots");
  }
  const std::int32_t num_drafts = config.scheduler.num_speculative_tokens;
  if (num_drafts < 0 || num_drafts > kMaxDrafts) {
    throw ConfigError("num_speculative_tokens must be from 0 to " + std::to_string(kMaxDrafts) +
                      ", not " + std::to_string(num_drafts));
  }
  if (config.max_sequence_tokens > 0) {
    state_.info.cells_per_slot = std::min(state_.info.cells_per_slot, config.max_sequence_tokens);
  }
  for (const auto& [user, weight] : config.scheduler.queue.fair_share.user_weights) {
    if (!(weight > 0.0 && std::isfinite(weight))) {
      throw ConfigError("the weight of user '" + user + "' must be a number above 0");
    }
  }
  state_.host.set_max_bytes(config.host_cache_bytes);
  update_stats();
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
    pin_requests_.erase(id);  // who lets go of one may keep another at once
  }
  inbox_ready_.notify_one();
}

void Engine::pause() {
  check_process();
  {
    const std::lock_guard lock(inbox_mutex_);
    is_paused_ = true;
  }
  inbox_ready_.notify_one();
}

void Engine::resume() {
  check_process();
  {
    const std::lock_guard lock(inbox_mutex_);
    is_paused_ = false;
    is_draining_ = false;
  }
  inbox_ready_.notify_one();
}

void Engine::drain() {
  check_process();
  {
    const std::lock_guard lock(inbox_mutex_);
    is_draining_ = true;
    is_paused_ = false;  // or it would never end
  }
  inbox_ready_.notify_one();
  tell_room_watchers();
}

void Engine::run() {
  for (;;) {
    wait_for_work();
    if (closing_) return;
    const std::lock_guard step_lock(step_mutex_);
    try {
      run_step();
    } catch (const std::exception& error) {
      fail_for_good(error);
      return;
    }
  }
}

// Until when a step would have nothing to do, unless a command comes: the next deadline, or when a
// batch is no longer held back to fill; the past where there is something to do now.
double Engine::idle_until() const {
  double next = std::numeric_limits<double>::infinity();
  if (requests_.empty()) return next;
  if (!state_.running.empty()) return -next;
  if (!deadlines_.empty()) next = deadlines_.begin()->first;
  if (!queue_deadlines_.empty()) next = std::min(next, queue_deadlines_.begin()->first);
  if (state_.is_paused && state_.waiting.num_preempted() == 0) return next;
  return std::min(next, scheduler_.held_until(state_));
}

void Engine::wait_for_work() {
  constexpr double kLongest = 3600.0;  // infinity is no duration
  std::unique_lock lock(inbox_mutex_);
  const auto has_news = [this] {
    return closing_ || !inbox_.empty() || is_paused_ != state_.is_paused;
  };
  const double seconds = std::min(idle_until() - clock_(), kLongest);
  if (seconds > 0.0) {
    (void)inbox_ready_.wait_for(lock, std::chrono::duration<double>(seconds), has_news);
  }
}

// A defect of ours, or a device that is lost: nothing about the state can be trusted, so nobody is
// left waiting for it.
void Engine::fail_for_good(const std::exception& error) {
  {
    const std::lock_guard lock(inbox_mutex_);
    closing_ = true;
  }
  tell_room_watchers();
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

void Engine::fail_all(const std::exception_ptr& error) {
  take_in();
  std::vector<EngineRequest*> open;
  open.reserve(requests_.size());
  for (const auto& [id, request] : requests_) open.push_back(request.get());
  // In the order in which they came: so are they tried again elsewhere.
  std::sort(open.begin(), open.end(), [](const auto* a, const auto* b) { return a->id < b->id; });
  for (EngineRequest* request : open) finish_request(*request, FinishReason::kError, error);
  publish(true);
}

void Engine::close() {
  if (getpid() != process_) return;
  const std::lock_guard close_lock(close_mutex_);
  {
    const std::lock_guard lock(inbox_mutex_);
    closing_ = true;
  }
  inbox_ready_.notify_all();
  tell_room_watchers();
  backend_->interrupt();
  if (thread_.joinable()) thread_.join();
  const std::lock_guard step_lock(step_mutex_);
  fail_all(std::make_exception_ptr(
      EngineClosedError("the engine was closed before the request was done")));
}

EngineStats Engine::stats() const {
  check_process();
  EngineStats stats;
  {
    const std::lock_guard lock(stats_mutex_);
    stats = published_stats_;
  }
  const std::lock_guard lock(inbox_mutex_);
  stats.is_paused = is_paused_;
  stats.is_draining = is_draining_;
  stats.num_refused = load_.num_refused();
  stats.num_shed = load_.num_shed();
  return stats;
}

}  // namespace batchcore
