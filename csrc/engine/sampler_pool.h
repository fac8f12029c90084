// Samples the rows of one step in parallel. Owned by the engine, whose thread is the only caller.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "engine/sampler.h"

namespace batchcore {

/// One row: who samples, from what, and where the token goes. Nothing is owned.
struct SampleJob {
  const Sampler* sampler = nullptr;
  const float* logits = nullptr;
  SampledToken* result = nullptr;
};

/// Jobs don't depend on one another, so results are the same for any number of threads. Workers
/// sleep between steps: the cores belong to the model then.
class SamplerPool {
 public:
  /// `num_threads` includes the calling thread; below 2 there are no workers.
  explicit SamplerPool(int num_threads);
  SamplerPool(const SamplerPool&) = delete;
  SamplerPool& operator=(const SamplerPool&) = delete;
  ~SamplerPool();

  /// Returns when every job is done, the calling thread working on them too. Where the work is too
  /// little to wake a worker for, it does all. If a job throws, the others are still done and the
  /// first exception is thrown on.
  void run(std::span<SampleJob> jobs);

  [[nodiscard]] int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  void work();
  void run_jobs(SamplerScratch& scratch);
  [[nodiscard]] std::size_t workers_for(std::span<const SampleJob> jobs) const;
  void stop();

  SamplerScratch scratch_;  // of the calling thread

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  // Guarded by mutex_. A job is taken under it as well: a row costs microseconds, the lock far
  // less.
  std::span<SampleJob> jobs_;
  std::size_t next_job_ = 0;
  std::size_t invited_ = 0;  // workers that may still join this run
  std::size_t busy_ = 0;     // workers that joined and haven't left
  std::exception_ptr error_;
  bool stopping_ = false;

  std::vector<std::thread> workers_;
};

}  // namespace batchcore
