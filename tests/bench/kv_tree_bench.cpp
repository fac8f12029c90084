// The account of the KV memory and index of prefixes, with 256 sequences of 1,100 tokens that have
// nothing or the first 1,000 in common: in the unified layout those are one run of cells, in
// streams each slot has its own copy.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "bench_fixture.h"
#include "core/eviction.h"
#include "core/kv_tree.h"
#include "core/scheduler_state.h"

namespace {

using namespace batchcore;

constexpr SeqId kNumSequences = 256;
constexpr SeqId kSpareSlot = kNumSequences;
constexpr std::int32_t kShared = 1000;
constexpr std::int32_t kOwnTokens = 100;
constexpr std::int32_t kVocab = 32'000;

std::vector<Token> random_tokens(std::mt19937& random, std::int32_t count) {
  std::vector<Token> tokens;
  for (std::int32_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<Token>(random() % kVocab));
  }
  return tokens;
}

BackendInfo info_of(KvLayout layout) {
  BackendInfo info;
  info.num_slots = kNumSequences + 1;
  info.num_cells = info.num_slots * 2048;
  info.cells_per_slot = 2048;
  info.layout = layout;
  return info;
}

struct Prefixes {
  /// The first `num_shared` tokens of all sequences, and of `prompt`, are the same.
  Prefixes(KvLayout layout, std::int32_t num_shared) : state(info_of(layout)) {
    std::mt19937 random(1);
    const std::vector<Token> prefix = random_tokens(random, num_shared);
    const auto with_prefix = [&] {
      std::vector<Token> tokens = prefix;
      const std::vector<Token> own = random_tokens(random, kShared + kOwnTokens - num_shared);
      tokens.insert(tokens.end(), own.begin(), own.end());
      return tokens;
    };
    for (SeqId slot = 0; slot < kNumSequences; ++slot) {
      const std::vector<Token> tokens = with_prefix();
      state.kv.open(slot);
      if (slot > 0) state.kv.share(0, slot, num_shared);
      state.kv.append(slot, std::span(tokens).subspan(slot > 0 ? prefix.size() : 0));
    }
    prompt = with_prefix();
  }

  SchedulerState state;
  std::vector<Token> prompt;  ///< what comes next
};

Prefixes& prefixes_of(const benchmark::State& state) {
  const auto layout = state.range(0) != 0 ? KvLayout::kStreams : KvLayout::kUnified;
  return bench::fixture<Prefixes>(layout, static_cast<std::int32_t>(state.range(1)));
}

const auto every_layout = [](auto* one) {
  one->ArgNames({"streams", "shared"})->Args({0, 0})->Args({0, kShared})->Args({1, kShared});
};

// A waiting request looks for its prefix, each time that it might be admitted. Bytes are those of
// the prompt.
void kv_tree_lookup(benchmark::State& state) {
  const Prefixes& prefixes = prefixes_of(state);
  for (auto _ : state) {
    PrefixMatch match = prefixes.state.kv.longest_match(prefixes.prompt, false);
    benchmark::DoNotOptimize(match);
    if (match.length < state.range(1)) {
      state.SkipWithError("the prefix is not found");
      break;
    }
  }
  state.SetBytesProcessed(state.iterations() *
                          static_cast<std::int64_t>(prefixes.prompt.size() * sizeof(Token)));
}
BENCHMARK(kv_tree_lookup)->Apply(every_layout);

// A sequence starts from the prefix, computes its own tokens, and leaves.
void kv_tree_insert_remove(benchmark::State& state) {
  Prefixes& prefixes = prefixes_of(state);
  KvTree& kv = prefixes.state.kv;
  const auto num_shared = static_cast<std::int32_t>(state.range(1));
  for (auto _ : state) {
    kv.open(kSpareSlot);
    kv.share(0, kSpareSlot, num_shared);
    kv.append(
        kSpareSlot,
        std::span<const Token>(prefixes.prompt).subspan(static_cast<std::size_t>(num_shared)));
    kv.remove(kSpareSlot);
  }
}
BENCHMARK(kv_tree_insert_remove)->Apply(every_layout);

// Every running sequence gets a cell in every step. One iteration is one token.
void kv_tree_append(benchmark::State& state) {
  Prefixes& prefixes = prefixes_of(state);
  KvTree& kv = prefixes.state.kv;
  const Token token = 7;
  SeqId slot = 0;
  for (auto _ : state) {
    kv.append(slot, std::span(&token, 1));
    slot = (slot + 1) % kNumSequences;
    if (slot == 0 && kv.length(0) >= 2 * (kShared + kOwnTokens)) {
      state.PauseTiming();  // rarely enough not to be felt
      for (SeqId each = 0; each < kNumSequences; ++each) kv.truncate(each, kShared + kOwnTokens);
      state.ResumeTiming();
    }
  }
  for (SeqId each = 0; each < kNumSequences; ++each) kv.truncate(each, kShared + kOwnTokens);
}
BENCHMARK(kv_tree_append)->Apply(every_layout);

// Which of 256 cached sequences to give up, where the memory is full.
void kv_tree_evict(benchmark::State& state) {
  Prefixes& prefixes = prefixes_of(state);
  KvTree& kv = prefixes.state.kv;
  for (SeqId slot = 0; slot < kNumSequences; ++slot) kv.set_cached(slot);
  for (auto _ : state) {
    SeqId victim = least_worth(prefixes.state, {}, {}, false);
    benchmark::DoNotOptimize(victim);
  }
  for (SeqId slot = 0; slot < kNumSequences; ++slot) kv.set_active(slot);
}
BENCHMARK(kv_tree_evict)->Apply(every_layout);

}  // namespace
