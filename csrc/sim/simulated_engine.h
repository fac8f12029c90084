// The real engine, queue, scheduler and KV account over a simulated backend, on a clock that jumps
// to whatever happens next. For replays of traces and for policies above several engines. Any
// thread may call, one at a time gets through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/sim_backend.h"
#include "engine/engine.h"
#include "sim/sim_request.h"

namespace batchcore {

struct SimOptions {
  BackendInfo backend;  ///< its n_vocab is set by the simulation
  SimCost cost;
  EngineConfig engine;
  std::vector<std::string>
      users;  ///< that SimRequest::user counts; none: the empty name is the first
};

/// What is submitted and has not ended.
struct SimLoad {
  std::int64_t num_requests = 0;
  std::int64_t num_tokens = 0;  ///< of their prompts, and to be generated
};

class SimulatedEngine {
 public:
  static constexpr double kForever = std::numeric_limits<double>::infinity();

  /// Throws ConfigError where the engine can't work like this.
  explicit SimulatedEngine(const SimOptions& options);

  /// What SimRequest::user is for this name, which is added where it is new.
  [[nodiscard]] std::int32_t user(const std::string& name);

  /// Runs until the request's arrival and submits it; false where the queue refused it. Its outcome
  /// has the next index. Throws InvalidRequestError, also for an arrival before the time that was
  /// reached, and PromptTooLongError; then it never existed.
  bool submit(const SimRequest& request);
  /// submit() for all of them, which ascend by arrival.
  void replay(std::span<const SimRequest> requests);

  /// Steps until the clock is at `time` or, in the middle of a step, beyond it.
  void run_until(double time);
  /// Steps until every request has ended, which is when the clock stops; false where as many steps
  /// were not enough.
  bool run_all(std::int64_t max_steps = std::numeric_limits<std::int64_t>::max());

  /// Seconds of virtual time.
  [[nodiscard]] double now() const;
  [[nodiscard]] SimLoad load() const;
  [[nodiscard]] EngineStats stats() const { return engine_.stats(); }
  [[nodiscard]] const BackendInfo& info() const { return engine_.info(); }

  /// Of all requests so far, in the order in which they were submitted.
  [[nodiscard]] std::vector<SimOutcome> outcomes() const;
  [[nodiscard]] std::size_t num_outcomes() const;
  /// Room for so many more, so that they are not moved while they come.
  void reserve(std::size_t num_requests);

 private:
  struct Open {
    std::shared_ptr<RequestChannel> channel;
    std::size_t index = 0;        // in outcomes_
    std::int64_t num_tokens = 0;  // as in SimLoad
    double deadline = kForever;
    double queue_deadline = kForever;
  };

  [[nodiscard]] double clock() const;
  std::int32_t number_of(const std::string& name);
  bool submit_one(const SimRequest& request);
  void advance(double time);
  void step(double limit);
  [[nodiscard]] double next_event() const;
  void collect(RequestId id);

  mutable std::mutex mutex_;
  std::vector<std::string> users_;
  std::unordered_map<std::string, std::int32_t> user_numbers_;
  const double max_wait_s_;
  SimBackend* backend_ = nullptr;  // the engine's
  double arrival_ = -1.0;          // of the request that is being submitted, < 0: none is
  double reached_ = 0.0;           // nobody may arrive before
  int num_idle_steps_ = 0;
  std::unordered_map<RequestId, Open> open_;
  SimLoad load_;
  std::vector<SimOutcome> outcomes_;
  Engine engine_;  // last: its clock reads the above
};

}  // namespace batchcore
