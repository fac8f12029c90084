// The waiting queue by its length and by the users that its requests come from. Each iteration puts
// in as many as it takes out.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench_fixture.h"
#include "core/queue_cursor.h"
#include "core/waiting_queue.h"

namespace {

using namespace batchcore;

constexpr std::size_t kMostPerStep = 256;  // that WaitingQueue::age() takes

struct Queue {
  // One more than wait: the newcomer. All users are active, whether or not theirs wait.
  Queue(std::int64_t num_queued, std::int64_t num_users, double aging_s)
      : waiting(QueueConfig{aging_s, {}}), sequences(static_cast<std::size_t>(num_queued) + 1) {
    for (std::int64_t i = 0; i < num_users; ++i) {
      users.push_back(waiting.enter("user-" + std::to_string(i)));
    }
    std::mt19937 random(1);
    for (Sequence& sequence : sequences) {
      sequence.user = users[random() % users.size()];
      sequence.tokens.assign(8, 1);
      sequence.num_prompt_tokens = 8;
      arrive(sequence);
    }
    newcomer = &sequences.back();
    waiting.erase(newcomer);
    if (aging_s > 0.0) {
      // Once all have aged they only get a new date each time, where there is no better tier.
      for (std::size_t i = 0; i <= waiting.size(); i += kMostPerStep) waiting.age(aging_s);
      now = 2 * aging_s;
    }
    picks.resize(4096);
    for (std::size_t& pick : picks) pick = random() % sequences.size();
  }

  void arrive(Sequence& sequence) {
    sequence.request_id = ++num_arrived;
    sequence.rank.arrival = num_arrived;
    waiting.push(&sequence);
  }

  WaitingQueue waiting;
  std::vector<UserId> users;
  std::vector<Sequence> sequences;
  Sequence* newcomer = nullptr;
  std::vector<std::size_t> picks;  // drawn before: the generator costs as much as a small queue
  std::uint64_t num_arrived = 0;
  double now = 0.0;
};

Queue& queue_of(const benchmark::State& state, double aging_s = 0.0) {
  return bench::fixture<Queue>(state.range(0), state.range(1), aging_s);
}

// A request comes and is cancelled, or times out, while all others still wait.
void queue_push_cancel(benchmark::State& state) {
  Queue& queue = queue_of(state);
  for (auto _ : state) {
    queue.arrive(*queue.newcomer);
    queue.waiting.erase(queue.newcomer);
  }
}

// A request comes, the first in line is admitted.
void queue_push_pop(benchmark::State& state) {
  Queue& queue = queue_of(state);
  for (auto _ : state) {
    queue.arrive(*queue.newcomer);
    QueueCursor cursor(queue.waiting);
    queue.newcomer = cursor.next();
    queue.waiting.erase(queue.newcomer);
  }
}

// A request comes, any of those that wait is cancelled.
void queue_push_cancel_any(benchmark::State& state) {
  Queue& queue = queue_of(state);
  std::size_t next = 0;
  for (auto _ : state) {
    queue.arrive(*queue.newcomer);
    queue.newcomer = &queue.sequences[queue.picks[next]];
    queue.waiting.erase(queue.newcomer);
    next = (next + 1) % queue.picks.size();
  }
}

// What one generated token costs its user, while requests of that user wait.
void queue_charge(benchmark::State& state) {
  Queue& queue = queue_of(state);
  std::size_t next = 0;
  for (auto _ : state) {
    queue.waiting.charge(queue.users[next], 2.0);
    next = (next + 1) % queue.users.size();
  }
}

const auto every_queue = [](auto* one) {
  one->ArgNames({"queued", "users"})->ArgsProduct({{0, 1000, 100'000}, {1, 1000}});
};
BENCHMARK(queue_push_cancel)->Apply(every_queue);
BENCHMARK(queue_push_pop)->Apply(every_queue);
BENCHMARK(queue_push_cancel_any)->Apply(every_queue);
BENCHMARK(queue_charge)->Apply(every_queue);

// A step in which as many are due as one takes.
void queue_age(benchmark::State& state) {
  Queue& queue = queue_of(state, 1.0);
  const double until_due =
      static_cast<double>(kMostPerStep) / static_cast<double>(queue.waiting.size());
  for (auto _ : state) {
    queue.waiting.age(queue.now);
    queue.now += until_due;
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(kMostPerStep));
}
BENCHMARK(queue_age)
    ->ArgNames({"queued", "users"})
    ->ArgsProduct({{1000, 100'000}, {1, 1000}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
