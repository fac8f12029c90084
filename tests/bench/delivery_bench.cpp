// What it costs the engine thread to hand one token to a consumer, and how long that takes to
// notice. Updates are built as Engine::publish() builds them.
#include <benchmark/benchmark.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "engine/notifier.h"
#include "engine/request_channel.h"

namespace {

using namespace batchcore;

RequestUpdate one_token() {
  CompletionDelta delta;
  delta.text = "token";
  delta.token_ids.push_back(7);
  RequestUpdate update;
  update.deltas.push_back(std::move(delta));
  return update;
}

void channel_publish_and_take(benchmark::State& state) {
  RequestChannel channel(1, nullptr);
  for (auto _ : state) {
    channel.publish(one_token());
    auto taken = channel.take();
    benchmark::DoNotOptimize(taken);
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(channel_publish_and_take);

// A consumer that takes only every so many tokens: the others are merged.
void channel_merge(benchmark::State& state) {
  RequestChannel channel(1, nullptr);
  for (auto _ : state) {
    for (std::int64_t i = 0; i < state.range(0); ++i) channel.publish(one_token());
    auto taken = channel.take();
    benchmark::DoNotOptimize(taken);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(channel_merge)->ArgName("tokens")->Arg(16)->Arg(1024);

// A step's delivery to an event loop: one token for each of so many requests, one wake-up through
// the file descriptor, all taken.
void notify_and_take(benchmark::State& state) {
  const auto notifier = std::make_shared<Notifier>();
  std::vector<std::unique_ptr<RequestChannel>> channels;
  for (std::int64_t i = 0; i < state.range(0); ++i) {
    channels.push_back(std::make_unique<RequestChannel>(static_cast<RequestId>(i) + 1, notifier));
  }
  for (auto _ : state) {
    for (const auto& channel : channels) channel->publish(one_token());
    notifier->wake();
    for (const RequestId id : notifier->take()) {
      auto taken = channels[static_cast<std::size_t>(id) - 1]->take();
      benchmark::DoNotOptimize(taken);
    }
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(notify_and_take)->ArgName("requests")->Arg(1)->Arg(16)->Arg(256);

// From publish() until a thread that sleeps in wait() has the token, and the way back through an
// atomic: real time, since the work is the kernel's.
void channel_round_trip(benchmark::State& state) {
  RequestChannel channel(1, nullptr);
  std::atomic<std::int64_t> num_taken{0};
  std::atomic<bool> is_over{false};
  std::thread consumer([&] {
    while (!is_over) {
      if (channel.wait(0.05) && channel.take()) num_taken.fetch_add(1, std::memory_order_release);
    }
  });
  std::int64_t num_published = 0;
  for (auto _ : state) {
    channel.publish(one_token());
    num_published += 1;
    while (num_taken.load(std::memory_order_acquire) < num_published) std::this_thread::yield();
  }
  is_over = true;
  consumer.join();
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(channel_round_trip)->UseRealTime();

}  // namespace
