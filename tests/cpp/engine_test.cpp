#include "engine/engine.h"

#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "core/errors.h"
#include "engine/notifier.h"
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

Tokens random_prompt(std::mt19937& random, int longest) {
  Tokens prompt(1 + random() % static_cast<unsigned>(longest));
  for (Token& token : prompt) token = static_cast<Token>(1 + random() % 63);
  return prompt;
}

Result run_alone(const RequestSpec& spec, SimOptions options) {
  options.cells_per_slot = testing::sim_info(options).cells_per_slot;
  options.num_cells = 8 * 4096;
  SimEngine sim(options);
  const auto channel = sim.engine.submit(spec);
  REQUIRE(sim.run());
  return collect(*channel);
}

TEST_CASE("a request ends with length, stop token, stop string or the end of generation") {
  SimEngine sim;
  RequestSpec spec = request({5, 6, 7}, 12);
  spec.sampling.ignore_eos = true;
  const auto plain = sim.engine.submit(spec);
  REQUIRE(sim.run());
  const Result whole = collect(*plain);
  const Tokens& tokens = whole.completions.at(0).token_ids;
  const std::string& text = whole.completions[0].text;
  CHECK(whole.completions[0].finish_reason == FinishReason::kLength);
  CHECK(tokens.size() == 12);

  spec.sampling.stop_token_ids = {tokens[4]};
  const auto by_token = sim.engine.submit(spec);
  REQUIRE(sim.run());
  const Result token_result = collect(*by_token);
  CHECK(token_result.completions[0].finish_reason == FinishReason::kStop);
  CHECK(std::get<Token>(token_result.completions[0].stop_reason) == tokens[4]);
  CHECK(token_result.completions[0].token_ids.back() == tokens[4]);

  spec.sampling.stop_token_ids = {};
  spec.sampling.stop = {text.substr(6, 3)};
  const auto by_text = sim.engine.submit(spec);
  REQUIRE(sim.run());
  const Result text_result = collect(*by_text);
  CHECK(text_result.completions[0].finish_reason == FinishReason::kStop);
  CHECK(text_result.completions[0].text == text.substr(0, text.find(text.substr(6, 3))));

  spec.sampling.stop = {};
  spec.sampling.ignore_eos = false;
  spec.sampling.logit_bias = {{testing::kEndToken, 100.0F}};
  spec.sampling.min_tokens = 3;
  const auto by_end = sim.engine.submit(spec);
  REQUIRE(sim.run());
  const Result end_result = collect(*by_end);
  CHECK(end_result.completions[0].finish_reason == FinishReason::kStop);
  CHECK(end_result.completions[0].token_ids.size() == 4);
  CHECK(std::holds_alternative<std::monostate>(end_result.completions[0].stop_reason));
}

TEST_CASE("a sequence that fills its slot ends with length and disturbs nobody") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    SimOptions options;
    options.layout = layout;
    options.num_cells = layout == KvLayout::kUnified ? 40 : 320;
    SimEngine sim(options);
    RequestSpec spec = request(Tokens(10, 3), 1000);
    spec.sampling.ignore_eos = true;
    const auto channel = sim.engine.submit(spec);
    REQUIRE(sim.run());
    const Result result = collect(*channel);
    CHECK(result.completions[0].finish_reason == FinishReason::kLength);
    CHECK(result.completions[0].token_ids.size() == 31);  // the last needs no cell
  }
}

TEST_CASE("what batch a request runs in does not change its output") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    for (const MemoryKind memory : {MemoryKind::kAttention, MemoryKind::kRecurrent}) {
      CAPTURE(static_cast<int>(layout));
      CAPTURE(static_cast<int>(memory));
      std::mt19937 random(11);
      SimOptions options;
      options.layout = layout;
      options.memory = memory;
      options.num_cells = layout == KvLayout::kUnified ? 160 : 8 * 160;
      SimEngine sim(options);
      std::vector<RequestSpec> specs;
      std::vector<std::shared_ptr<RequestChannel>> channels;
      for (int i = 0; i < 40; ++i) {
        RequestSpec spec = request(random_prompt(random, 60), 1 + static_cast<int>(random() % 40));
        if (i % 3 == 0) spec.prompt.insert(spec.prompt.begin(), 50, 7);
        if (i % 4 == 1) {
          spec.sampling.temperature = 1.0F;
          spec.sampling.seed = random();
        }
        if (i % 5 == 2) spec.sampling.n = 3;
        spec.sampling.seed = static_cast<std::uint64_t>(i);
        specs.push_back(spec);
        channels.push_back(sim.engine.submit(spec));
      }
      REQUIRE(sim.run());
      for (std::size_t i = 0; i < specs.size(); ++i) {
        const Result together = collect(*channels[i]);
        const Result alone = run_alone(specs[i], options);
        REQUIRE(together.completions.size() == alone.completions.size());
        for (std::size_t k = 0; k < alone.completions.size(); ++k) {
          CHECK(together.completions[k].token_ids == alone.completions[k].token_ids);
          CHECK(together.completions[k].text == alone.completions[k].text);
        }
      }
      CHECK(sim.engine.stats().num_decode_failures == 0);
    }
  }
}

TEST_CASE("a preempted sequence goes on as if nothing had happened, saved or computed again") {
  for (const PreemptionMode mode : {PreemptionMode::kSave, PreemptionMode::kRecompute}) {
    SimOptions options;
    options.num_cells = 100;
    options.preemption = mode;
    SimEngine sim(options);
    std::vector<RequestSpec> specs;
    std::vector<std::shared_ptr<RequestChannel>> channels;
    for (int i = 0; i < 4; ++i) {
      RequestSpec spec = request({1, 2, static_cast<Token>(10 + i)}, 60);
      spec.sampling.ignore_eos = true;
      spec.sampling.temperature = 1.0F;
      spec.sampling.repetition_penalty = 1.3F;
      spec.sampling.seed = static_cast<std::uint64_t>(i);
      specs.push_back(spec);
      channels.push_back(sim.engine.submit(spec));
    }
    REQUIRE(sim.run());
    CHECK(sim.engine.stats().num_preemptions > 0);
    CHECK((sim.engine.stats().num_saves > 0) == (mode == PreemptionMode::kSave));
    for (std::size_t i = 0; i < specs.size(); ++i) {
      CHECK(collect(*channels[i]).completions[0].token_ids ==
            run_alone(specs[i], options).completions[0].token_ids);
    }
  }
}

TEST_CASE("decoding sequences are in every step while a long prompt is taken in chunks") {
  SimEngine sim;
  RequestSpec first = request({1, 2, 3}, 60);
  first.sampling.ignore_eos = true;
  first.streams = true;
  const auto decoding = sim.engine.submit(first);
  sim.engine.step();
  const auto arriving = sim.engine.submit(request(Tokens(120, 9), 4));
  while (!arriving->is_finished()) {
    REQUIRE(decoding->take());
    sim.engine.step();
  }
}

TEST_CASE("a first token does not wait for the calls that the step still makes") {
  SimOptions options;
  options.layout = KvLayout::kStreams;
  options.num_slots = 4;
  auto owned = std::make_unique<FaultyBackend>(sim_info(options), options.cost);
  FaultyBackend* backend = owned.get();
  SimEngine sim(std::move(owned), options);
  RequestSpec spec = request({1, 2, 3}, 20);
  spec.sampling.ignore_eos = true;
  spec.streams = true;
  (void)sim.engine.submit(spec);
  sim.engine.step();
  spec.prompt = {4, 5, 6};
  const auto arriving = sim.engine.submit(spec);
  spec.prompt = {7, 8, 9};
  spec.sampling.max_tokens = 1;
  const auto brief = sim.engine.submit(spec);
  int num_calls = 0;
  backend->fault = [&](const MicroBatch& batch) {
    num_calls += 1;
    if (batch.seq_ids.front() == 0) {  // the first one decodes, behind the prompts
      CHECK(arriving->take());
      // Who is done keeps its place in the plan.
      CHECK_FALSE(brief->is_finished());
    }
    return DecodeStatus::kOk;
  };
  CHECK(sim.engine.step().size() == 3);
  CHECK(num_calls == 3);
  CHECK_FALSE(arriving->take());
  CHECK(brief->is_finished());
}

TEST_CASE("a system prompt that many share is computed once") {
  SimOptions options;
  options.num_cells = 2048;
  options.num_slots = 16;
  options.max_num_seqs = 8;
  SimEngine sim(options);
  std::mt19937 random(3);
  std::int64_t asked = 0;
  for (int i = 0; i < 48; ++i) {
    Tokens prompt(500, 7);
    for (int k = 0; k < 5; ++k) prompt.push_back(static_cast<Token>(1 + random() % 63));
    asked += static_cast<std::int64_t>(prompt.size());
    (void)sim.engine.submit(request(prompt, 4));
  }
  REQUIRE(sim.run());
  CHECK(sim.engine.stats().num_prefill_tokens < asked * 15 / 100);
}

TEST_CASE("aborting frees the slot within one step and loses nothing of the others") {
  SimEngine sim;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 6; ++i) {
    RequestSpec spec = request({1, 2, static_cast<Token>(3 + i)}, 30);
    spec.sampling.ignore_eos = true;
    channels.push_back(sim.engine.submit(spec));
  }
  sim.engine.step();
  CHECK(sim.engine.stats().num_running == 4);
  sim.engine.abort(channels[0]->id());
  sim.engine.abort(channels[5]->id());  // still waits
  sim.engine.step();
  CHECK(collect(*channels[0]).completions.at(0).finish_reason == FinishReason::kCancelled);
  CHECK(collect(*channels[5]).completions.at(0).finish_reason == FinishReason::kCancelled);
  CHECK(sim.engine.stats().num_running == 4);
  CHECK(sim.engine.stats().num_waiting == 0);
  REQUIRE(sim.run());
  CHECK(collect(*channels[4]).completions[0].token_ids.size() == 30);
}

TEST_CASE("timeouts end requests in the queue and while running") {
  SimEngine sim;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 5; ++i) {
    RequestSpec spec = request({1, static_cast<Token>(2 + i)}, 50);
    spec.sampling.ignore_eos = true;
    spec.timeout_s = i == 4 ? 0.05 : 0.5;
    spec.priority = i == 4 ? 1 : 0;  // in one tier the earliest deadline would go first
    channels.push_back(sim.engine.submit(spec));
  }
  REQUIRE(sim.run());
  for (const auto& channel : channels) {
    const Result result = collect(*channel);
    CHECK(result.completions[0].finish_reason == FinishReason::kTimeout);
    CHECK(result.completions[0].token_ids.empty() == (channel == channels[4]));
  }
  CHECK(sim.engine.stats().num_finished[static_cast<std::size_t>(FinishReason::kTimeout)] == 5);
}

TEST_CASE("lower priority numbers go first") {
  SimOptions options;
  options.max_num_seqs = 1;
  SimEngine sim(options);
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (const int priority : {2, 0, 1}) {
    RequestSpec spec = request({1, static_cast<Token>(5 + priority)}, 4);
    spec.priority = priority;
    channels.push_back(sim.engine.submit(spec));
  }
  REQUIRE(sim.run());
  const auto finished = [&](int i) {
    return collect(*channels[static_cast<std::size_t>(i)]).metrics.finished_s;
  };
  const double last = finished(0);
  const double first = finished(1);
  const double middle = finished(2);
  CHECK(first < middle);
  CHECK(middle < last);
}

TEST_CASE("what can't be served is refused at once") {
  SimOptions options;
  options.max_queued_requests = 2;
  SimEngine sim(options);
  CHECK_THROWS_AS((void)sim.engine.submit(request({}, 1)), InvalidRequestError);
  CHECK_THROWS_AS((void)sim.engine.submit(request({64}, 1)), InvalidRequestError);
  CHECK_THROWS_AS((void)sim.engine.submit(request(Tokens(257, 1), 1)), PromptTooLongError);
  RequestSpec many = request({1}, 1);
  many.sampling.n = 5;
  CHECK_THROWS_AS((void)sim.engine.submit(many), InvalidRequestError);
  const auto first = sim.engine.submit(request({1}, 1));
  const auto second = sim.engine.submit(request({1}, 1));
  CHECK_THROWS_AS((void)sim.engine.submit(request({1}, 1)), QueueFullError);
  REQUIRE(sim.run());
  CHECK_NOTHROW((void)sim.engine.submit(request({1}, 1)));
  sim.engine.close();
  CHECK_THROWS_AS((void)sim.engine.submit(request({1}, 1)), EngineClosedError);
  CHECK_THROWS_AS(sim.engine.step(), EngineClosedError);
}

TEST_CASE("closing ends every request with a typed error") {
  SimEngine sim;
  std::vector<std::shared_ptr<RequestChannel>> channels;
  for (int i = 0; i < 9; ++i) channels.push_back(sim.engine.submit(request({1, 2, 3}, 50)));
  sim.engine.step();
  sim.engine.close();
  for (const auto& channel : channels) {
    if (!channel->is_finished()) FAIL("left open");
    const Result result = collect(*channel);
    if (result.completions.at(0).finish_reason == FinishReason::kError) {
      CHECK_THROWS_AS(std::rethrow_exception(result.error), EngineClosedError);
    }
  }
}

constexpr DecodeStatus kFailures[] = {DecodeStatus::kNoSlot, DecodeStatus::kInterrupted,
                                      DecodeStatus::kInvalidBatch, DecodeStatus::kAllocFailed,
                                      DecodeStatus::kComputeFailed};

// Fails one call in `one_in`, but never one with a slot whose last call failed: a request that
// fails twice in a row is at fault, and these tests are about those that are not.
auto passing_failures(std::mt19937& random, unsigned one_in, std::vector<DecodeStatus> kinds) {
  return [&random, one_in, kinds, owed = std::set<SeqId>()](const MicroBatch& batch) mutable {
    std::set<SeqId> slots(batch.seq_ids.begin(), batch.seq_ids.end());
    const bool spared =
        std::any_of(slots.begin(), slots.end(), [&](SeqId slot) { return owed.count(slot) > 0; });
    if (spared || random() % one_in != 0) {
      for (const SeqId slot : slots) owed.erase(slot);
      return DecodeStatus::kOk;
    }
    owed.insert(slots.begin(), slots.end());
    return kinds[random() % kinds.size()];
  };
}

TEST_CASE("a passing failure of any kind costs no request anything") {
  for (const DecodeStatus failure : kFailures) {
    for (const MemoryKind memory : {MemoryKind::kAttention, MemoryKind::kRecurrent}) {
      CAPTURE(static_cast<int>(failure));
      CAPTURE(static_cast<int>(memory));
      SimOptions options;
      options.memory = memory;
      auto owned = std::make_unique<FaultyBackend>(testing::sim_info(options), options.cost);
      FaultyBackend& backend = *owned;
      SimEngine sim(std::move(owned), options);
      std::mt19937 random(5);
      backend.leaves_a_part =
          static_cast<int>(failure) < -1 || failure == DecodeStatus::kInterrupted;
      backend.fault = passing_failures(random, 4, {failure});
      std::vector<std::pair<RequestSpec, std::shared_ptr<RequestChannel>>> all;
      for (int i = 0; i < 8; ++i) {
        RequestSpec spec = request(Tokens(static_cast<std::size_t>(3 + 9 * i), 3 + i), 12);
        spec.sampling.n = 1 + i % 2;
        all.emplace_back(spec, sim.engine.submit(spec));
      }
      REQUIRE(sim.run());
      for (const auto& [spec, channel] : all) {
        const Result result = collect(*channel);
        const Result alone = run_alone(spec, options);
        for (std::size_t k = 0; k < alone.completions.size(); ++k) {
          CHECK(result.completions[k].token_ids == alone.completions[k].token_ids);
        }
      }
    }
  }
}

TEST_CASE("a request that always fails ends with its error, and takes nobody with it") {
  for (const DecodeStatus failure : kFailures) {
    if (failure == DecodeStatus::kInterrupted) continue;
    CAPTURE(static_cast<int>(failure));
    SimOptions options;
    auto owned = std::make_unique<FaultyBackend>(testing::sim_info(options), options.cost);
    FaultyBackend& backend = *owned;
    SimEngine sim(std::move(owned), options);
    backend.fault = [&](const MicroBatch& batch) {
      const bool poisoned = std::count(batch.tokens.begin(), batch.tokens.end(), 13) > 0;
      if (poisoned && failure == DecodeStatus::kComputeFailed) throw std::runtime_error("device");
      return poisoned ? failure : DecodeStatus::kOk;
    };
    std::vector<std::shared_ptr<RequestChannel>> channels;
    for (int i = 0; i < 6; ++i) {
      RequestSpec spec = request({1, 2, static_cast<Token>(i == 2 ? 13 : 20 + i)}, 10);
      spec.sampling.logit_bias = {{13, -100.0F}};
      channels.push_back(sim.engine.submit(spec));
    }
    REQUIRE(sim.run());
    for (std::size_t i = 0; i < channels.size(); ++i) {
      const Result result = collect(*channels[i]);
      CHECK((result.completions[0].finish_reason == FinishReason::kError) == (i == 2));
      if (i == 2) CHECK_THROWS_AS(std::rethrow_exception(result.error), DecodeError);
    }
  }
}

TEST_CASE("any order of submit, abort, timeout, failure and step loses nothing") {
  for (unsigned seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    SimOptions options;
    options.layout = seed % 2 == 0 ? KvLayout::kUnified : KvLayout::kStreams;
    options.memory = seed % 3 == 0 ? MemoryKind::kRecurrent : MemoryKind::kAttention;
    options.num_cells = options.layout == KvLayout::kUnified ? 90 : 8 * 90;
    options.prefix_caching = seed % 5 != 0;
    options.cost.loose_row_s = seed % 7 < 4 ? 0.01 : 0.0;
    options.host_cache_bytes = seed % 3 == 1 ? 4096 : 0;
    options.preemption = seed % 4 == 2 ? PreemptionMode::kSave : PreemptionMode::kAuto;
    options.adjust = [seed](EngineConfig& config) {
      config.scheduler.queue.aging_s = seed % 3 == 2 ? 0.1 : 0.0;
      config.scheduler.queue.fair_share.max_idle_users = 2;
      config.scheduler.preempt_for_slots = seed % 4 != 3;
      config.scheduler.max_wait_s = seed % 8 == 5 ? 0.05 : 0.0;
      config.scheduler.adaptive = seed % 6 == 4;
      config.scheduler.target_itl_s = seed % 6 == 4 ? 0.015 : 0.0;
      if (seed % 5 == 3) config.scheduler.tier_limits = {{0, 0, 1}, {2, 3, 0}};
    };
    auto owned = std::make_unique<FaultyBackend>(testing::sim_info(options), options.cost);
    owned->leaves_a_part = seed % 2 == 1;
    owned->fault = passing_failures(random, 20, {std::begin(kFailures), std::end(kFailures)});
    FaultyBackend& backend = *owned;
    SimEngine sim(std::move(owned), options);
    std::vector<std::pair<RequestSpec, std::shared_ptr<RequestChannel>>> all;
    for (int operation = 0; operation < 300; ++operation) {
      switch (random() % 6) {
        case 0:
        case 1: {
          RequestSpec spec =
              request(random_prompt(random, 70), 1 + static_cast<int>(random() % 50));
          if (random() % 3 == 0) spec.prompt.assign(20 + random() % 30, 7);
          if (random() % 4 == 0) spec.sampling.n = 2 + static_cast<int>(random() % 3);
          spec.pins = options.prefix_caching && spec.sampling.n == 1 && random() % 8 == 0;
          if (random() % 5 == 0) spec.timeout_s = 0.2;
          if (random() % 5 == 0) spec.queue_timeout_s = 0.1;
          spec.priority = static_cast<int>(random() % 3);
          spec.user = std::string(random() % 6, 'u');
          spec.streams = random() % 2 == 0;
          try {
            all.emplace_back(spec, sim.engine.submit(spec));
          } catch (const InvalidRequestError&) {
            // Half of the slots are pinned, or the tier may not have as many.
            REQUIRE((spec.pins || spec.sampling.n == 4));
          }
          break;
        }
        case 2:
          if (all.empty()) break;
          sim.engine.abort(all[random() % all.size()].second->id());
          if (random() % 4 == 0) sim.engine.unpin(all[random() % all.size()].second->id());
          if (random() % 8 == 0) sim.engine.pause();
          if (random() % 3 == 0) sim.engine.resume();
          break;
        default:
          sim.engine.step();
      }
    }
    sim.engine.resume();
    REQUIRE(sim.run());
    for (const auto& [spec, channel] : all) {
      REQUIRE(channel->is_finished());
      const Result result = collect(*channel);
      REQUIRE(result.completions.size() == static_cast<std::size_t>(spec.sampling.n));
      if (result.error) CHECK_NOTHROW(std::rethrow_exception(result.error));
      for (const CompletionDelta& completion : result.completions) {
        REQUIRE(completion.finish_reason);
        REQUIRE(completion.finish_reason != FinishReason::kError);
      }
      if (spec.sampling.n > 1 || result.completions[0].finish_reason != FinishReason::kLength)
        continue;
      RequestSpec again = spec;
      again.timeout_s.reset();
      again.queue_timeout_s.reset();
      REQUIRE(result.completions[0].token_ids ==
              run_alone(again, options).completions[0].token_ids);
    }
    CHECK(backend.num_refused == 0);
    CHECK(sim.engine.stats().num_running == 0);
    CHECK(sim.engine.stats().num_waiting == 0);
    CHECK(sim.engine.stats().num_active_cells == 0);
    CHECK(sim.engine.stats().num_active_users == 0);
  }
}

TEST_CASE("many threads submit, abort and wait while the loop runs") {
  SimOptions options;
  options.num_cells = 400;
  SimEngine sim(options);
  sim.engine.start();
  std::vector<std::thread> threads;
  std::atomic<int> ended{0};
  for (unsigned t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 25; ++i) {
        RequestSpec spec = request(random_prompt(random, 50), 20);
        spec.streams = i % 2 == 0;
        const auto channel = sim.engine.submit(spec);
        if (random() % 3 == 0) sim.engine.abort(channel->id());
        while (!channel->is_finished()) {
          if (channel->wait(1.0)) (void)channel->take();
        }
        ended += 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ended == 200);
  CHECK_FALSE(sim.engine.has_work());
  sim.engine.close();
}

TEST_CASE("closing while the loop runs leaves nobody waiting") {
  for (int round = 0; round < 10; ++round) {
    SimEngine sim;
    sim.engine.start();
    std::vector<std::shared_ptr<RequestChannel>> channels;
    for (int i = 0; i < 20; ++i) channels.push_back(sim.engine.submit(request({1, 2}, 40)));
    std::thread waiter([&] {
      for (const auto& channel : channels) {
        while (!channel->is_finished()) (void)channel->wait(5.0);
      }
    });
    sim.engine.close();
    waiter.join();
  }
}

TEST_CASE("an event loop is woken once for all news, and again only after it took them") {
  SimEngine sim;
  const auto notifier = std::make_shared<Notifier>();
  for (int i = 0; i < 3; ++i) {
    RequestSpec spec = request({1, static_cast<Token>(2 + i)}, 3);
    spec.sampling.ignore_eos = true;
    spec.streams = true;
    spec.notifier = notifier;
    (void)sim.engine.submit(spec);
  }
  sim.engine.step();
  sim.engine.step();
  CHECK(notifier->take().size() == 3);
  CHECK(notifier->take().empty());
}

}  // namespace
}  // namespace batchcore
