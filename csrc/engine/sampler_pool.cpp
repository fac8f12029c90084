#include "engine/sampler_pool.h"

#include <algorithm>
#include <utility>

namespace batchcore {
namespace {

// A worker takes tens of microseconds to wake up, in which a thread looks at about this many
// logits.
constexpr std::size_t kWorkPerThread = std::size_t{1} << 18U;

}  // namespace

SamplerPool::SamplerPool(int num_threads) {
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (...) {
    stop();
    throw;
  }
}

SamplerPool::~SamplerPool() { stop(); }

void SamplerPool::run(std::span<SampleJob> jobs) {
  const std::size_t helpers = workers_for(jobs);
  {
    const std::lock_guard lock(mutex_);
    jobs_ = jobs;
    next_job_ = 0;
    invited_ = helpers;
  }
  for (std::size_t i = 0; i < helpers; ++i) wake_.notify_one();
  run_jobs(scratch_);
  std::unique_lock lock(mutex_);
  invited_ = 0;  // whoever hasn't woken up by now is late
  idle_.wait(lock, [this] { return busy_ == 0; });
  jobs_ = {};
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void SamplerPool::work() {
  SamplerScratch scratch;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || invited_ > 0; });
    if (stopping_) return;
    --invited_;
    ++busy_;
    lock.unlock();
    run_jobs(scratch);
    lock.lock();
    if (--busy_ == 0) idle_.notify_one();
  }
}

void SamplerPool::run_jobs(SamplerScratch& scratch) {
  for (;;) {
    SampleJob job;
    {
      const std::lock_guard lock(mutex_);
      if (next_job_ == jobs_.size()) return;
      job = jobs_[next_job_++];
    }
    try {
      *job.result = job.sampler->sample(job.logits, scratch);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
}

std::size_t SamplerPool::workers_for(std::span<const SampleJob> jobs) const {
  if (workers_.empty() || jobs.size() < 2) return 0;
  std::size_t total = 0;
  for (const SampleJob& job : jobs) total += job.sampler->work();
  return std::min({workers_.size(), jobs.size() - 1, total / kWorkPerThread});
}

void SamplerPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

}  // namespace batchcore
