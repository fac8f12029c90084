// Speculation in the engine: whatever is drafted, outputs are those of an engine without.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::collect;
using testing::FaultyBackend;
using testing::request;
using testing::Result;
using testing::SimEngine;
using testing::SimOptions;
using Tokens = std::vector<Token>;

SimOptions drafting(SimOptions options, std::int32_t most) {
  options.adjust = [most](EngineConfig& config) { config.scheduler.num_speculative_tokens = most; };
  return options;
}

// A device on which rows are nearly free.
SimOptions cheap_rows(KvLayout layout = KvLayout::kUnified) {
  SimOptions options;
  options.layout = layout;
  options.num_cells = layout == KvLayout::kUnified ? 1200 : 8 * 300;
  options.cost.decode_row_s = options.cost.prefill_token_s = 1e-4;
  return options;
}

// A loop, or in one token of some the next one of two or three, which nobody can foresee.
RequestSpec repetitive(std::size_t variety, std::int32_t max_tokens, std::uint64_t seed = 0) {
  RequestSpec spec = request({9, 8, 7}, max_tokens);
  for (std::size_t i = 0; i < variety; ++i) {
    spec.sampling.logit_bias.emplace_back(static_cast<Token>(20 + i), 100.0F);
  }
  if (variety > 1) spec.sampling.temperature = 1.0F;
  spec.sampling.seed = seed;
  spec.sampling.ignore_eos = true;
  return spec;
}

struct Outputs {
  std::vector<Result> results;
  EngineStats stats;
};

Outputs run(SimEngine& sim, const std::vector<RequestSpec>& specs) {
  std::vector<std::shared_ptr<RequestChannel>> channels;
  channels.reserve(specs.size());
  for (const RequestSpec& spec : specs) channels.push_back(sim.engine.submit(spec));
  REQUIRE(sim.run());
  Outputs outputs;
  for (const auto& channel : channels) outputs.results.push_back(collect(*channel));
  outputs.stats = sim.engine.stats();
  return outputs;
}

Outputs run(const SimOptions& options, const std::vector<RequestSpec>& specs) {
  SimEngine sim(options);
  return run(sim, specs);
}

void check_equal(const Outputs& ours, const Outputs& theirs) {
  REQUIRE(ours.results.size() == theirs.results.size());
  for (std::size_t i = 0; i < ours.results.size(); ++i) {
    CAPTURE(i);
    CHECK(!ours.results[i].error);
    const auto& completions = ours.results[i].completions;
    const auto& expected = theirs.results[i].completions;
    REQUIRE(completions.size() == expected.size());
    for (std::size_t k = 0; k < completions.size(); ++k) {
      CHECK(completions[k].token_ids == expected[k].token_ids);
      CHECK(completions[k].text == expected[k].text);
      CHECK(completions[k].finish_reason == expected[k].finish_reason);
      CHECK(completions[k].stop_reason == expected[k].stop_reason);
      REQUIRE(completions[k].logprobs.size() == expected[k].logprobs.size());
      for (std::size_t at = 0; at < expected[k].logprobs.size(); ++at) {
        CHECK(completions[k].logprobs[at].sampled.token == expected[k].logprobs[at].sampled.token);
        CHECK(completions[k].logprobs[at].sampled.logprob ==
              expected[k].logprobs[at].sampled.logprob);
      }
    }
  }
}

TEST_CASE("a text that repeats takes fewer steps, and is the same") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    CAPTURE(static_cast<int>(layout));
    const SimOptions options = cheap_rows(layout);
    const std::vector<RequestSpec> specs{repetitive(1, 120)};
    const Outputs plain = run(options, specs);
    const Outputs drafted = run(drafting(options, 7), specs);
    check_equal(drafted, plain);
    CHECK(plain.stats.num_draft_tokens == 0);
    CHECK(drafted.stats.num_accepted_tokens > 60);
    CHECK(drafted.stats.num_draft_tokens >= drafted.stats.num_accepted_tokens);
    CHECK(drafted.stats.num_steps < plain.stats.num_steps / 2);
    CHECK(drafted.stats.num_steps == plain.stats.num_steps - drafted.stats.num_accepted_tokens);
    CHECK(drafted.stats.num_generated_tokens == 120);
  }
}

TEST_CASE("all kinds of requests together give what they give without drafts") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    for (const bool caching : {true, false}) {
      CAPTURE(static_cast<int>(layout));
      CAPTURE(caching);
      SimOptions options = cheap_rows(layout);
      options.prefix_caching = caching;
      std::mt19937 random(7);
      std::vector<RequestSpec> specs;
      for (std::uint64_t i = 0; i < 60; ++i) {
        RequestSpec spec = repetitive(1 + random() % 3, 1 + static_cast<int>(random() % 90), i);
        if (i % 4 == 0) spec.prompt = Tokens(1 + random() % 60, static_cast<Token>(1 + i % 5));
        if (i % 3 == 0) spec.sampling.logprobs = static_cast<std::int32_t>(i % 2) * 3;
        if (i % 5 == 1) spec.sampling.stop = {"5555555555", "456", "65465"};
        if (i % 5 == 2) spec.sampling.n = 3;
        if (i % 7 == 3) spec.sampling.repetition_penalty = 1.2F;
        if (i % 11 == 4) spec.sampling.stop_token_ids = {22};
        if (i % 13 == 5) spec.sampling.logit_bias = {};  // nothing repeats
        specs.push_back(spec);
      }
      const Outputs drafted = run(drafting(options, 6), specs);
      check_equal(drafted, run(options, specs));
      CHECK(drafted.stats.num_decode_failures == 0);
      CHECK(drafted.stats.num_accepted_tokens > 200);
      CHECK(drafted.stats.num_accepted_tokens < drafted.stats.num_draft_tokens);
    }
  }
}

TEST_CASE("a run of accepted tokens ends where the request does") {
  SimOptions options = drafting(cheap_rows(), 7);
  options.max_num_seqs = 1;
  SimEngine sim(options);
  (void)run(sim, {repetitive(1, 60)});  // drafts have turned out right
  const auto end_of = [&](const RequestSpec& spec) {
    const std::int64_t before = sim.engine.stats().num_accepted_tokens;
    const Outputs outputs = run(sim, {spec});
    CHECK(sim.engine.stats().num_accepted_tokens > before);
    return outputs.results[0].completions.at(0);
  };
  for (int length = 10; length < 30; ++length) {
    RequestSpec spec = repetitive(1, length);
    CHECK(end_of(spec).token_ids == Tokens(static_cast<std::size_t>(length), 20));
    spec.sampling.max_tokens = 200;
    spec.sampling.stop = {std::string(static_cast<std::size_t>(length), '4')};
    const CompletionDelta stopped = end_of(spec);
    CHECK(stopped.token_ids.size() == static_cast<std::size_t>(length));
    CHECK(stopped.text.empty());
    CHECK(stopped.finish_reason == FinishReason::kStop);
    spec.sampling.stop = {};
    spec.sampling.stop_token_ids = {20};
    spec.sampling.min_tokens = length;  // the next largest logits until then
    CHECK(run(sim, {spec}).results[0].completions.at(0).token_ids.back() == 20);
  }
  CHECK(sim.engine.stats().num_decode_failures == 0);
}

TEST_CASE("drafts stay within the slot, and the last token of a full one needs no cell") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    SimOptions options = cheap_rows(layout);
    options.num_cells = layout == KvLayout::kUnified ? 50 : 400;
    auto owned =
        std::make_unique<FaultyBackend>(testing::sim_info(drafting(options, 16)), options.cost);
    FaultyBackend* backend = owned.get();
    SimEngine sim(std::move(owned), drafting(options, 16));
    const Outputs outputs = run(sim, {repetitive(1, 1000)});
    CHECK(outputs.results[0].completions.at(0).token_ids.size() == 48);
    CHECK(outputs.stats.num_accepted_tokens > 10);
    CHECK(backend->num_refused == 0);
  }
}

TEST_CASE("sequences that give way for want of cells go on with drafts") {
  for (const PreemptionMode mode : {PreemptionMode::kSave, PreemptionMode::kRecompute}) {
    SimOptions options = cheap_rows();
    options.num_cells = 130;
    options.preemption = mode;
    std::vector<RequestSpec> specs;
    for (std::uint64_t i = 0; i < 12; ++i) specs.push_back(repetitive(1 + i % 2, 60, i));
    const Outputs drafted = run(drafting(options, 5), specs);
    check_equal(drafted, run(options, specs));
    CHECK(drafted.stats.num_preemptions > 0);
    CHECK(drafted.stats.num_accepted_tokens > 50);
    CHECK(drafted.stats.num_decode_failures == 0);
  }
}

TEST_CASE("memories that can't be cut back, and static batches, are left alone") {
  for (const MemoryKind memory : {MemoryKind::kRecurrent, MemoryKind::kHybrid}) {
    SimOptions options = cheap_rows();
    options.memory = memory;
    const std::vector<RequestSpec> specs(3, repetitive(1, 60));
    const Outputs drafted = run(drafting(options, 5), specs);
    check_equal(drafted, run(options, specs));
    CHECK(drafted.stats.num_draft_tokens == 0);
    CHECK(drafted.stats.num_generated_tokens == 180);
  }
  SimEngine sim(drafting(cheap_rows(), 5));
  const auto channels = sim.engine.submit_all(std::vector<RequestSpec>(2, repetitive(1, 60)), true);
  REQUIRE(sim.run());
  CHECK(collect(*channels[0]).completions.at(0).token_ids.size() == 60);
  CHECK(sim.engine.stats().num_draft_tokens == 0);
}

TEST_CASE("where rows cost as much as calls nothing is drafted for long") {
  SimOptions options;
  options.num_cells = 4000;
  options.cost = {1e-4, 1e-2, 1e-2};
  const std::vector<RequestSpec> specs(4, repetitive(1, 400));
  const Outputs drafted = run(drafting(options, 5), specs);
  check_equal(drafted, run(options, specs));
  CHECK(drafted.stats.num_draft_tokens < 150);  // of 1,600: to see what they cost
}

TEST_CASE("where drafts are wrong hardly any are verified") {
  SimOptions options = cheap_rows();
  options.cost.decode_row_s = options.cost.prefill_token_s = 3e-3;
  std::vector<RequestSpec> specs;
  for (std::uint64_t i = 0; i < 4; ++i) specs.push_back(repetitive(7, 280, i));
  const Outputs drafted = run(drafting(options, 5), specs);
  check_equal(drafted, run(options, specs));
  CHECK(drafted.stats.num_draft_tokens < 100);  // of 1,120
}

TEST_CASE("a call that fails because of its drafts is made again without, and costs nobody") {
  const SimOptions options = drafting(cheap_rows(), 5);
  auto owned = std::make_unique<FaultyBackend>(testing::sim_info(options), options.cost);
  FaultyBackend* backend = owned.get();
  SimEngine sim(std::move(owned), options);
  bool is_decoding = false;
  backend->fault = [&](const MicroBatch& batch) {
    const bool has_drafts = is_decoding && batch.size() > 4;
    is_decoding = true;
    return has_drafts ? DecodeStatus::kNoSlot : DecodeStatus::kOk;
  };
  backend->leaves_a_part = true;
  const std::vector<RequestSpec> specs(1, repetitive(1, 250));
  const Outputs outputs = run(sim, specs);
  check_equal(outputs, run(cheap_rows(), specs));
  CHECK(outputs.stats.num_decode_failures > 0);
  CHECK(outputs.stats.num_decode_failures < 6);  // rarer and rarer
}

// Refuses to forget a part, as a memory would whose window has moved on.
struct StubbornBackend : SimBackend {
  using SimBackend::SimBackend;
  bool remove(SeqId seq_id, Position begin, Position end) override {
    if (begin > 0 && begin <= pos_max(seq_id)) {
      num_refusals += 1;
      return false;
    }
    return SimBackend::remove(seq_id, begin, end);
  }
  int num_refusals = 0;
};

TEST_CASE("where rejected drafts can't be cut off, the sequence is computed again") {
  const SimOptions options = drafting(cheap_rows(), 5);
  auto owned = std::make_unique<StubbornBackend>(testing::sim_info(options), options.cost);
  StubbornBackend* backend = owned.get();
  SimEngine sim(std::move(owned), options);
  std::vector<RequestSpec> specs;
  for (std::uint64_t i = 0; i < 4; ++i) specs.push_back(repetitive(2, 80, i));
  const Outputs outputs = run(sim, specs);
  check_equal(outputs, run(cheap_rows(), specs));
  CHECK(backend->num_refusals > 0);
  CHECK(outputs.stats.num_prefill_tokens > 4 * 3);
}

TEST_CASE("a request is cancelled between two runs of accepted tokens") {
  SimEngine sim(drafting(cheap_rows(), 7));
  RequestSpec spec = repetitive(1, 250);
  spec.streams = true;
  const auto cancelled = sim.engine.submit(spec);
  const auto other = sim.engine.submit(repetitive(1, 250));
  std::size_t num_tokens = 0;
  for (int i = 0; i < 30; ++i) {
    sim.engine.step();
    for (const CompletionDelta& delta : collect(*cancelled).completions) {
      num_tokens += delta.token_ids.size();
    }
  }
  CHECK(sim.engine.stats().num_accepted_tokens > 20);
  sim.engine.abort(cancelled->id());
  REQUIRE(sim.run());
  const Result end = collect(*cancelled);
  CHECK(end.completions.at(0).finish_reason == FinishReason::kCancelled);
  CHECK(num_tokens < 250);
  CHECK(collect(*other).completions.at(0).token_ids == Tokens(250, 20));
}

TEST_CASE("prefixes of drafted outputs serve who asks for them, without the rejected tokens") {
  SimEngine sim(drafting(cheap_rows(), 5));
  const Outputs first = run(sim, {repetitive(2, 100, 3)});
  RequestSpec next = repetitive(2, 40, 4);
  const Tokens& said = first.results[0].completions.at(0).token_ids;
  next.prompt.insert(next.prompt.end(), said.begin(), said.end());
  const Outputs second = run(sim, {next});
  CHECK(second.results[0].metrics.num_cached_tokens >= 100);
  check_equal(second, run(cheap_rows(), {next}));
}

}  // namespace
}  // namespace batchcore
