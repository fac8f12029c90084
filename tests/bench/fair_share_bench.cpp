// Who was served how much, by the number of active users: once per generated token, and once per
// request.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/fair_share.h"

namespace {

using namespace batchcore;

void fair_share_charge(benchmark::State& state) {
  FairShare users;
  std::vector<UserId> active;
  for (std::int64_t i = 0; i < state.range(0); ++i) {
    active.push_back(users.enter("user-" + std::to_string(i)));
  }
  std::size_t next = 0;
  for (auto _ : state) {
    users.charge(active[next], 2.0);
    next = (next + 1) % active.size();
  }
}
BENCHMARK(fair_share_charge)->ArgName("users")->Arg(1)->Arg(100)->Arg(10'000);

// A request of a user who is known and idle begins and ends, beside others who stay.
void fair_share_enter_leave(benchmark::State& state) {
  FairShare users;
  constexpr std::size_t kNumIdle = 1000;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < kNumIdle; ++i) names.push_back("idle-" + std::to_string(i));
  for (std::int64_t i = 0; i < state.range(0); ++i) users.enter("user-" + std::to_string(i));
  for (const std::string& name : names) users.leave(users.enter(name));
  std::size_t next = 0;
  for (auto _ : state) {
    users.leave(users.enter(names[next]));
    next = (next + 1) % kNumIdle;
  }
}
BENCHMARK(fair_share_enter_leave)->ArgName("users")->Arg(1)->Arg(100)->Arg(10'000);

}  // namespace
