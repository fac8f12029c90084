// Batches requests over one backend. One thread runs the loop; any thread may submit, abort, read
// stats and close. Each step: take commands in, plan, decode, sample, publish.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/batch_size.h"
#include "core/queue_rate.h"
#include "core/scheduler.h"
#include "core/vocab.h"
#include "engine/engine_sequence.h"
#include "engine/engine_stats.h"
#include "engine/queue_load.h"
#include "engine/request.h"
#include "engine/request_channel.h"
#include "engine/sampler_pool.h"

namespace batchcore {

struct EngineConfig {
  SchedulerConfig scheduler;
  std::int64_t max_queued_requests = 0;           ///< waiting for their first slot, > 0
  std::int64_t max_queued_tokens = 0;             ///< prompt tokens of those, > 0
  std::int64_t max_queued_requests_per_user = 0;  ///< 0 = no bound of its own
  std::int64_t max_queued_tokens_per_user = 0;    ///< 0 = no bound of its own
  bool shed = false;  ///< refuse at submit who would wait in the queue longer than its timeout
  std::size_t max_saved_bytes = 0;       ///< host memory for preempted sequences
  std::size_t host_cache_bytes = 0;      ///< host memory for prefixes that were evicted
  std::int32_t max_sequence_tokens = 0;  ///< prompt and output, 0 = what a slot holds
  std::int32_t num_sampler_threads = 1;
#ifdef NDEBUG
  bool check_integrity = false;  ///< prove the accounting after every step; for tests
#else
  bool check_integrity = true;
#endif
};

/// Seconds on a clock that never goes back.
using EngineClock = std::function<double()>;
[[nodiscard]] double steady_seconds();

class Engine {
 public:
  static constexpr RequestId kRoomNews = 0;  ///< no request has it

  Engine(std::unique_ptr<Backend> backend, std::shared_ptr<const Vocab> vocab,
         const EngineConfig& config, EngineClock clock = steady_seconds);
  /// Closes.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Starts the loop thread. Without it the caller drives the engine with step().
  void start();

  /// Queues a request. Throws InvalidRequestError, PromptTooLongError, QueueFullError or
  /// EngineClosedError, and then the request never existed.
  [[nodiscard]] std::shared_ptr<RequestChannel> submit(RequestSpec spec);

  /// Queues all of them or, where one can't be served, none. `in_lock_step` makes them a static
  /// batch.
  [[nodiscard]] std::vector<std::shared_ptr<RequestChannel>> submit_all(
      std::vector<RequestSpec> specs, bool in_lock_step);

  /// Ends a request as kCancelled within one step, which is cut short where all that it computes
  /// is cancelled and the device can. Does nothing for one that has ended.
  void abort(RequestId id);

  /// Lets go of the prefix that a request with `pins` left behind, which stays as an ordinary
  /// cached one. Does nothing where it is gone already.
  void unpin(RequestId id);

  /// Until resume() nobody is admitted who was not before; those who were go on. Timeouts go on
  /// too.
  void pause();
  /// Ends pause() and drain().
  void resume();
  /// Until resume() every submit throws EngineClosedError; what was submitted before goes on,
  /// paused or not.
  void drain();

  /// Runs one step on the calling thread (only without start()); returns the requests with news.
  std::vector<RequestId> step();

  /// True while a request has not reached its terminal state.
  [[nodiscard]] bool has_work() const { return num_open_ > 0; }

  /// True after close(), and where it failed for good.
  [[nodiscard]] bool is_closed() const { return closing_; }

  [[nodiscard]] EngineStats stats() const;
  [[nodiscard]] const BackendInfo& info() const { return state_.info; }
  /// The process that made it; in any other, an engine must be neither used nor destroyed.
  [[nodiscard]] int process() const { return process_; }

  /// Whether the queue's bounds have room for `demand` now. This and the next throw
  /// EngineClosedError where the engine takes no more requests.
  [[nodiscard]] bool has_room(const QueueDemand& demand) const;
  /// Waits for it; false where `seconds` did not suffice. Somebody else may still be faster.
  bool wait_for_room(const QueueDemand& demand, double seconds);
  /// Waits until has_work() is false; false where `seconds` did not suffice.
  bool wait_until_idle(double seconds);
  /// Marks `notifier` once with kRoomNews: when a request leaves the queue, the engine becomes idle
  /// or takes no more requests.
  void watch_room(const std::shared_ptr<Notifier>& notifier);

  /// Ends every request with EngineClosedError and stops the thread. Idempotent.
  void close();

 private:
  struct Inbox {
    std::vector<std::unique_ptr<EngineRequest>> requests;
    std::vector<RequestId> aborts;
    std::vector<RequestId> unpins;
    [[nodiscard]] bool empty() const {
      return requests.empty() && aborts.empty() && unpins.empty();
    }
  };

  struct SampledRow {
    EngineSequence* sequence = nullptr;
    std::int32_t row = 0;         // in batch_
    std::int32_t num_drafts = 0;  // in the rows behind it
    std::int32_t num_right = 0;   // in those before it
  };

  // engine.cpp: what other threads call, and the loop.
  void check_process() const;
  void run();
  [[nodiscard]] double idle_until() const;
  void wait_for_work();
  void fail_all(const std::exception_ptr& error);
  void fail_for_good(const std::exception& error);

  // engine_intake.cpp: from submit to the waiting queue.
  void validate(const RequestSpec& spec) const;
  void require_pins(std::int32_t num_pins) const;
  void take_in();
  void accept(std::unique_ptr<EngineRequest> request);
  void expire(double now);
  void leave_queue(EngineRequest& request);
  void require_open() const;
  void tell_room_watchers();

  // engine_step.cpp: carrying out a plan.
  std::vector<RequestId> run_step();
  void observe_queue(double now);
  void update_batch_size();
  void admit(const Admission& admission);
  void run_micro_batches(const StepPlan& plan);
  void run_micro_batch(std::span<const PlannedRows> rows, const PlannedMicroBatch& extras);
  DecodeStatus decode(std::span<const PlannedRows> rows);
  void handle_failure(std::span<const PlannedRows> rows, DecodeStatus status);
  void advance(std::span<const PlannedRows> rows);
  void count_padding(std::span<const PlannedRows> rows, const PlannedMicroBatch& extras);
  void sample_rows();
  void start_forks();

  // engine_drafts.cpp: tokens that are guessed and verified together.
  void propose_drafts();
  [[nodiscard]] bool goes_on_with_draft(const SampledRow& row, Token token);
  void cut_drafts_off();
  [[nodiscard]] bool excuse_drafts(DecodeStatus status);

  // engine_memory.cpp: KV memory beside the decode calls.
  void preempt(EngineSequence& sequence, bool keeps_cells);
  void save(EngineSequence& sequence);
  void restore(EngineSequence& sequence);
  void drop_saved(EngineSequence& sequence);
  void evict(SeqId slot);
  void pack_slots();
  void exchange_slots(SeqId a, SeqId b);
  void restore_slot(SeqId slot, std::span<const std::uint8_t> state);
  void save_prefix(SeqId slot);
  void restore_prefix(const Admission& admission);
  void adopt_prefix(const Admission& admission);
  void forget_fillers(const PlannedMicroBatch& extras);
  void fork(EngineSequence& leader);
  void reconcile(EngineSequence& sequence);
  void forget(EngineSequence& sequence);
  void rebuild_backend();
  bool evict_all();

  // engine_output.cpp: tokens to text, terminal states, publishing.
  void add_token(EngineSequence& sequence, SampledToken& sampled, double now);
  void add_text(EngineSequence& sequence, Token token);
  void flush_text(EngineSequence& sequence);
  void finish(EngineSequence& sequence, FinishReason reason, StopReason why = {});
  void finish_request(EngineRequest& request, FinishReason reason, std::exception_ptr error = {});
  void release_slot(EngineSequence& sequence);
  void pin(EngineRequest& request, SeqId slot);
  void drop_pin(SeqId slot);
  [[nodiscard]] bool is_pinned(RequestId id) const;
  void mark_news(EngineRequest& request);
  void publish(bool ends_step);
  void update_stats();
  void count_tiers();
  void check_integrity() const;

  static EngineSequence& of(Sequence* sequence) { return static_cast<EngineSequence&>(*sequence); }

  const std::unique_ptr<Backend> backend_;
  const std::shared_ptr<const Vocab> vocab_;
  const EngineConfig config_;
  const EngineClock clock_;
  const Scheduler scheduler_;
  const int process_;

  // Shared with callers.
  mutable std::mutex inbox_mutex_;
  std::condition_variable inbox_ready_;
  std::condition_variable room_changed_;
  std::vector<std::shared_ptr<Notifier>> room_watchers_;
  Inbox inbox_;
  std::atomic<bool> closing_{false};
  RequestId next_id_ = 1;
  QueueLoad load_;  // submitted, not yet admitted or ended
  bool is_paused_ = false;
  bool is_draining_ = false;
  std::set<RequestId> pin_requests_;  // whose prefix is pinned or about to be, and not let go of
  std::atomic<std::int64_t> num_open_{0};
  std::mutex in_flight_mutex_;
  std::vector<RequestId> in_flight_;  // requests of the decode call that runs, not yet aborted
  mutable std::mutex stats_mutex_;
  EngineStats published_stats_;

  // Engine thread (or whoever holds step_mutex_ in manual mode).
  std::mutex step_mutex_;
  SchedulerState state_;
  std::unordered_map<RequestId, std::unique_ptr<EngineRequest>> requests_;
  std::set<std::pair<double, RequestId>> deadlines_;
  std::set<std::pair<double, RequestId>> queue_deadlines_;
  // Since the last step.
  double last_step_at_ = 0.0;
  bool did_wait_ = false;  // somebody waited for room, and not for anything else
  std::int64_t num_admitted_ = 0;
  std::int64_t admitted_tokens_ = 0;
  QueueRate queue_rate_;
  BatchSizeController batch_size_;
  double kv_per_row_ = 0.0;  // recently, of decode rows
  std::vector<EngineRequest*> news_;
  std::vector<RequestId> published_;  // in this step
  MicroBatch batch_;
  std::vector<SampledRow> sampled_rows_;
  std::vector<SeqId> drafted_slots_;    // of this call
  std::uint64_t drafts_from_step_ = 0;  // none before: calls with drafts have failed
  std::uint64_t drafts_pause_ = 0;      // steps, next time
  std::vector<SampledToken> samples_;
  SamplerPool samplers_;
  std::size_t saved_bytes_ = 0;
  std::unordered_map<SeqId, RequestId> pins_;  // pinned slots, by the request that asked for it
  EngineStats stats_;

  std::mutex close_mutex_;
  std::thread thread_;
};

}  // namespace batchcore
