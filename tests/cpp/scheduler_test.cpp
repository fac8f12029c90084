#include "core/scheduler.h"

#include <doctest/doctest.h>

#include <span>
#include <string>
#include <vector>

#include "core/eviction.h"
#include "scene.h"

namespace batchcore {
namespace {

using testing::numbers;
using testing::Scene;

TEST_CASE("nothing to do is an empty plan") { CHECK(Scene().plan().empty()); }

TEST_CASE("a prompt alone gets the whole micro-batch") {
  Scene scene;
  scene.waits(numbers(1, 20));
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].slot == 0);
  REQUIRE(plan.micro_batches.size() == 1);
  CHECK(Scene::rows(plan.micro_batches[0]) == "1x16");
}

TEST_CASE("who decodes is in the step, whatever else is") {
  for (const KvLayout layout : {KvLayout::kUnified, KvLayout::kStreams}) {
    Scene scene(layout);
    scene.runs(1, numbers(1, 5), 4);
    scene.runs(0, numbers(10, 3), 2);
    scene.waits(numbers(20, 9));
    const StepPlan plan = scene.plan();
    if (layout == KvLayout::kUnified) {
      REQUIRE(plan.micro_batches.size() == 1);
      CHECK(Scene::rows(plan.micro_batches[0]) == "2x1 1x1 3x9");
    } else {
      REQUIRE(plan.micro_batches.size() == 2);
      CHECK(Scene::rows(plan.micro_batches[0]) == "3x9");
      CHECK(Scene::rows(plan.micro_batches[1]) == "2x1 1x1");
    }
  }
}

TEST_CASE("slots bound how many run, and the lowest free one is taken") {
  Scene scene;
  scene.runs(0, {1, 2}, 1);
  scene.runs(2, {3, 4}, 1);
  scene.waits({5, 6});
  scene.waits({7, 8});
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].slot == 1);
  CHECK(plan.admissions[0].sequence->request_id == 3);
}

TEST_CASE("lower priority numbers are admitted first, then earlier arrivals") {
  Scene scene;
  scene.waits({1}, 4, 1);
  scene.waits({2}, 4, 0);
  scene.waits({3}, 4, 0);
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 3);
  CHECK(plan.admissions[0].sequence->request_id == 2);
  CHECK(plan.admissions[1].sequence->request_id == 3);
  CHECK(plan.admissions[2].sequence->request_id == 1);
}

TEST_CASE("completions that will fork are admitted with the slots they need") {
  Scene scene;
  scene.runs(0, {1, 2}, 1);
  scene.waits({3, 4}).num_forks = 2;  // three sequences, and only two more may run
  scene.waits({5, 6});
  CHECK(scene.plan().admissions.empty());
}

TEST_CASE("a cached prefix is copied, or taken over where all of it fits") {
  Scene scene;
  scene.caches(0, numbers(1, 8), 5);
  scene.waits({1, 2, 3, 90});
  scene.waits({1, 2, 3, 4, 5, 6, 7, 8, 91});
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 2);
  CHECK(plan.admissions[0].prefix_slot == 0);
  CHECK(plan.admissions[0].prefix_length == 3);
  CHECK(plan.admissions[0].slot == 1);
  CHECK(plan.admissions[1].prefix_slot == 0);
  CHECK(plan.admissions[1].prefix_length == 8);
  // The first still copies from slot 0 in this step, so the second may not take it over.
  CHECK(plan.admissions[1].slot == 2);
}

TEST_CASE("the last token of a prompt is always computed") {
  Scene scene;
  scene.caches(0, numbers(1, 8), 5);
  scene.waits(numbers(1, 8));
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].prefix_length == 7);
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x1");
}

TEST_CASE("a call never has more rows than it may, whoever joins it") {
  Scene scene;
  scene.caches(2, numbers(1, 8), 5);
  scene.runs(0, numbers(30, 40), 10, 4);
  scene.waits(numbers(1, 8));
  const StepPlan plan = scene.plan();
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x16");
  CHECK(plan.admissions.empty());
}

TEST_CASE("who shares a long prefix with a prompt in the making waits for it") {
  Scene scene(KvLayout::kUnified, 512);
  scene.waits(numbers(1, 60));
  std::vector<Token> second = numbers(1, 50);
  second.push_back(99);
  scene.waits(second);
  scene.waits({70, 71});
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);  // the first takes the whole micro-batch
  scene.state.waiting.erase(scene.all[0].get());
  Sequence& first = *scene.all[0];
  first.slot = 0;
  first.num_computed = 10;
  scene.state.kv.open(0);
  scene.state.kv.append(0, numbers(1, 10));
  scene.state.running.push_back(&first);
  scene.config.prefill_policy = PrefillPolicy::kThroughput;
  scene.state.info.n_ubatch = 64;
  const StepPlan next = scene.plan();
  REQUIRE(next.admissions.size() == 1);
  CHECK(next.admissions[0].sequence->request_id == 3);  // the second is held, nobody behind it is
}

TEST_CASE("a user whose requests all wait for a prefix stands in no other user's way") {
  Scene scene(KvLayout::kUnified, 512);
  scene.state.info.n_ubatch = 64;
  scene.config.prefill_policy = PrefillPolicy::kThroughput;
  scene.runs(0, numbers(1, 60), 10);
  for (int i = 0; i < 30; ++i) {
    std::vector<Token> prompt = numbers(1, 50);
    prompt.push_back(99);
    scene.waits(prompt);
  }
  Sequence& other = scene.add({70, 71}, 4);
  other.user = scene.state.waiting.enter("other");
  scene.state.waiting.charge(other.user, 1000);
  scene.state.waiting.push(&other);
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].sequence == &other);
}

TEST_CASE("users are admitted by what they got, cached tokens not counted") {
  Scene scene(KvLayout::kUnified, 512, 8);
  scene.state.info.n_ubatch = 64;
  scene.config.max_num_seqs = 4;
  scene.caches(7, numbers(1, 8), 5);
  const auto waits = [&scene](const char* user, std::vector<Token> tokens) {
    Sequence& sequence = scene.add(std::move(tokens), 4);
    sequence.user = scene.state.waiting.enter(user);
    scene.state.waiting.push(&sequence);
  };
  for (int i = 0; i < 3; ++i) waits("a", {1, 2, 3, 4, 5, 6, 7, 80 + i});  // 7 of 8 are cached
  for (int i = 0; i < 3; ++i) waits("b", {50, 51, 52 + i});
  const StepPlan plan = scene.plan();
  std::vector<RequestId> admitted;
  for (const Admission& admission : plan.admissions) {
    admitted.push_back(admission.sequence->request_id);
  }
  CHECK(admitted == std::vector<RequestId>{1, 4, 2, 3});  // a 1, b 3, a 2, a 3
  CHECK(scene.state.waiting.users().counter(scene.all[0]->user) == 0);
}

TEST_CASE("cells that run out are taken from cached prefixes first, least recently used first") {
  Scene scene(KvLayout::kUnified, 20);
  scene.caches(1, numbers(40, 6), 7);
  scene.caches(2, numbers(60, 6), 3);
  scene.state.step = 9;
  scene.runs(0, numbers(1, 8), 8 - 1);
  scene.all[0]->tokens.push_back(5);  // two pending: it prefills
  const StepPlan plan = scene.plan();
  CHECK(plan.preemptions.empty());
  CHECK(plan.evictions == std::vector<SeqId>{2});
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x2");
}

TEST_CASE("of two prefixes of one age the one goes whose cells are cheaper to compute again") {
  Scene scene(KvLayout::kUnified, 40);
  scene.state.step = 9;
  scene.caches(1, numbers(1, 20), 5);
  scene.caches(2, numbers(60, 12), 5);
  for (int i = 0; i < 40; ++i) {
    const StepWork work{i % 9, 1 + i % 5, 10 * (i % 7)};
    scene.state.cost.observe(
        work, 0.01 + 0.001 * work.prefill_tokens + 1e-3 * static_cast<double>(work.kv_tokens));
  }
  CHECK(least_worth(scene.state, {}, {}, false) == 2);
  scene.state.last_used[2] = 8;  // it served a moment ago
  CHECK(least_worth(scene.state, {}, {}, false) == 1);
  const SeqId keep = 1;
  CHECK(least_worth(scene.state, std::span(&keep, 1), {}, false) == 2);
}

TEST_CASE("a prefix that others hold too is given up first, for nothing is lost") {
  Scene scene(KvLayout::kUnified, 40);
  scene.state.step = 9;
  scene.caches(1, numbers(1, 8), 2);
  scene.state.kv.open(2);
  scene.state.kv.share(1, 2, 8);
  scene.state.kv.append(2, numbers(50, 4));
  scene.state.kv.set_cached(2);
  scene.state.last_used[2] = 1;
  CHECK(least_worth(scene.state, {}, {}, false) == 1);
}

TEST_CASE("pinned prefixes give way to nobody but a sequence that could not run otherwise") {
  Scene scene(KvLayout::kUnified, 20);
  scene.caches(1, numbers(40, 8), 1);
  scene.state.pinned[1] = true;
  scene.runs(0, numbers(1, 8), 7, 20);
  scene.runs(2, numbers(20, 5), 4, 20);
  const StepPlan two = scene.plan();
  CHECK(two.evictions.empty());
  CHECK(two.preemptions == std::vector<Sequence*>{scene.all[1].get()});
  scene.state.running.pop_back();
  scene.state.kv.remove(2);
  scene.all[0]->tokens.insert(scene.all[0]->tokens.end(), 9, 3);  // needs 10 more, 5 are free
  const StepPlan one = scene.plan();
  CHECK(one.evictions == std::vector<SeqId>{1});
  CHECK(Scene::rows(one.micro_batches.at(0)) == "1x10");
}

TEST_CASE("a prefix in host memory is restored where it goes further than what a slot holds") {
  Scene scene(KvLayout::kUnified, 512);
  scene.state.info.n_ubatch = 128;
  scene.state.host.set_max_bytes(1000);
  scene.state.host.put({std::vector<Token>(100, 7), std::vector<std::uint8_t>(10)}, false);
  scene.caches(1, std::vector<Token>(20, 7), 1);
  std::vector<Token> prompt(90, 7);
  prompt.push_back(8);
  scene.waits(prompt);
  const StepPlan plan = scene.plan();
  REQUIRE(plan.admissions.size() == 1);
  CHECK(plan.admissions[0].host != nullptr);
  CHECK(plan.admissions[0].prefix_length == 90);
  CHECK(plan.admissions[0].prefix_slot == -1);
  scene.caches(2, std::vector<Token>(60, 7), 1);  // 30 more are not worth a copy
  CHECK(scene.plan().admissions.at(0).host == nullptr);
}

TEST_CASE("the faster number of rows is found by trying, and tried again later") {
  CallTimes times;
  double loose = 3.0;
  const auto seconds = [&loose](std::int32_t rows) { return 10.0 + rows + loose * (rows % 4); };
  const auto decode = [&](std::int32_t rows, int calls) {
    int filled = 0;
    for (int i = 0; i < calls; ++i) {
      const std::int32_t size = times.preferred(rows, 4);
      CHECK((size == rows || size == next_multiple(rows, 4)));
      times.observe(size, seconds(size));
      filled += size != rows ? 1 : 0;
    }
    return filled;
  };
  CHECK(times.preferred(8, 4) == 8);
  CHECK(decode(15, 300) > 280);  // 16 costs 26, 15 costs 34
  loose = 0.0;
  decode(15, 5000);  // now 15 costs 25; it is tried every 400 calls
  CHECK(decode(15, 300) < 20);
  CHECK(decode(2, 300) < 20);
}

TEST_CASE("calls get the number of rows that is known to be faster") {
  Scene scene(KvLayout::kUnified, 4096);
  scene.state.info.max_outputs = 16;
  scene.state.info.n_ubatch = 512;
  scene.config.max_num_seqs = 4;
  for (int i = 0; i < 5; ++i) {
    scene.state.call_times.observe(3, 0.060);
    scene.state.call_times.observe(4, 0.048);
  }
  scene.runs(0, numbers(1, 4), 3);
  scene.runs(1, numbers(1, 4), 3);
  CHECK(scene.plan().micro_batches.at(0).filler_slots.empty());
  scene.runs(2, numbers(1, 4), 3);
  CHECK(scene.plan().micro_batches.at(0).filler_slots == std::vector<SeqId>{3});
  // A prompt fills the rows by itself; the output head gets a row more.
  scene.waits(std::vector<Token>(400, 9));
  const PlannedMicroBatch batch = scene.plan().micro_batches.at(0);
  CHECK(Scene::rows(batch) == "1x1 2x1 3x1 4x125");
  CHECK(batch.filler_slots.empty());
  CHECK(batch.num_extra_outputs == 1);
}

TEST_CASE("sequences are kept apart where attention between them would be computed too") {
  Scene scene(KvLayout::kUnified, 4096, 24);
  scene.state.info.max_outputs = 24;
  scene.state.info.n_ubatch = 512;
  scene.state.info.attention_tile = 16;
  scene.config.max_num_seqs = 24;
  scene.runs(0, numbers(1, 4), 3);
  scene.runs(1, numbers(1, 4), 3);
  SUBCASE("a short prompt rides along with who decodes") {
    scene.waits(numbers(30, 8));
    const StepPlan plan = scene.plan();
    REQUIRE(plan.micro_batches.size() == 1);
    CHECK(Scene::rows(plan.micro_batches[0]) == "1x1 2x1 3x8");
  }
  SUBCASE("long ones get a call of their own") {
    scene.waits(numbers(30, 20));
    scene.waits(numbers(60, 10));
    const StepPlan plan = scene.plan();
    REQUIRE(plan.micro_batches.size() == 2);
    CHECK(Scene::rows(plan.micro_batches[0]) == "1x1 2x1");
    CHECK(Scene::rows(plan.micro_batches[1]) == "3x20 4x10");
  }
  SUBCASE("who decodes is split evenly") {
    for (SeqId slot = 2; slot < 18; ++slot) scene.runs(slot, numbers(40 * slot, 4), 3);
    const StepPlan plan = scene.plan();
    REQUIRE(plan.micro_batches.size() == 2);
    CHECK(plan.micro_batches[0].rows.size() == 12);
    CHECK(plan.micro_batches[1].rows.size() == 6);
  }
  SUBCASE("streams know no such thing") {
    scene.state.info.layout = KvLayout::kStreams;
    for (SeqId slot = 2; slot < 18; ++slot) scene.runs(slot, numbers(40 * slot, 4), 3);
    CHECK(scene.plan().micro_batches.size() == 1);
  }
}

TEST_CASE("kernels that take any number of rows get no dummy rows and no extra logits") {
  Scene scene(KvLayout::kUnified, 4096);
  scene.state.info.row_group = 1;
  scene.state.info.max_outputs = 16;
  scene.state.info.n_ubatch = 512;
  scene.config.max_num_seqs = 4;
  for (int i = 0; i < 5; ++i) {
    scene.state.call_times.observe(3, 0.060);
    scene.state.call_times.observe(4, 0.048);  // by chance: nothing is to be learnt from it
  }
  for (SeqId slot = 0; slot < 3; ++slot) scene.runs(slot, numbers(1, 4), 3);
  CHECK(scene.plan().micro_batches.at(0).filler_slots.empty());
  // With row groups of four the chunk has 125 tokens.
  scene.waits(std::vector<Token>(400, 9));
  const StepPlan plan = scene.plan();
  REQUIRE(plan.micro_batches.size() == 1);
  CHECK(Scene::rows(plan.micro_batches[0]) == "1x1 2x1 3x1 4x128");
  CHECK(plan.micro_batches[0].filler_slots.empty());
  CHECK(plan.micro_batches[0].num_extra_outputs == 0);
}

TEST_CASE("kernels that take any number of rows get decoding and prompts in one call") {
  Scene scene(KvLayout::kUnified, 4096, 24);
  scene.state.info.row_group = 1;
  scene.state.info.max_outputs = 24;
  scene.state.info.n_ubatch = 512;
  scene.config.max_num_seqs = 24;
  for (SeqId slot = 0; slot < 3; ++slot) scene.runs(slot, numbers(40 * slot, 4), 3);
  scene.waits(numbers(300, 100));
  scene.waits(numbers(500, 50));
  const StepPlan plan = scene.plan();
  REQUIRE(plan.micro_batches.size() == 1);
  CHECK(Scene::rows(plan.micro_batches[0]) == "1x1 2x1 3x1 4x100 5x28");
}

TEST_CASE("a chunk has as many tokens as the target allows where rows come in no groups") {
  Scene scene(KvLayout::kUnified, 4096);
  scene.state.info.row_group = 1;
  scene.state.info.n_ubatch = 512;
  scene.runs(0, numbers(1, 3), 2);
  Sequence& prompt = scene.waits(std::vector<Token>(400, 9));
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x128");
  for (int i = 0; i < 40; ++i) {
    const std::int32_t prefill = 16 * (i % 9);
    const std::int32_t rows = 1 + i % 5;
    scene.state.cost.observe({prefill, rows, 0}, 0.010 + 0.001 * prefill + 0.002 * rows);
  }
  scene.config.target_itl_s = 0.1145;  // 12 ms, and 102 tokens of 1 ms
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x102");
  scene.config.target_itl_s = 0.020;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x64");
  scene.config.prefill_policy = PrefillPolicy::kLatency;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x16");
  scene.config.prefill_policy = PrefillPolicy::kThroughput;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x400");
  SUBCASE("and up to three more where they are the prompt's last") {
    scene.config.prefill_policy = PrefillPolicy::kLatency;
    prompt.tokens.resize(19);
    CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x19");
    prompt.tokens.resize(20, 9);
    CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x16");
  }
}

TEST_CASE("gaps between streams are bridged for any kernels, groups are filled for some") {
  Scene scene(KvLayout::kStreams, 16 * 64, 16);
  scene.state.info.row_group = 1;
  scene.state.info.max_outputs = 16;
  for (int i = 0; i < 5; ++i) {
    scene.state.call_times.observe(4, 0.060);
    scene.state.call_times.observe(5, 0.060);
    scene.state.call_times.observe(8, 0.048);
  }
  scene.runs(0, numbers(1, 4), 3);
  scene.runs(1, numbers(1, 40), 4);  // a prompt: a token of it is computed in the call that decodes
  scene.runs(3, numbers(1, 4), 3);
  const StepPlan plan = scene.plan();
  REQUIRE(plan.micro_batches.size() == 2);
  CHECK(Scene::rows(plan.micro_batches[0]) == "2x16");
  CHECK(Scene::rows(plan.micro_batches[1]) == "1x1 2x1 3x1");
  CHECK(plan.micro_batches[1].filler_slots == std::vector<SeqId>{2});
  CHECK(plan.micro_batches[1].num_extra_outputs == 0);
}

TEST_CASE("a prompt's chunk is sized for the batch that builds up, not for the few who decode") {
  Scene scene(KvLayout::kStreams, 16 * 4096, 16);
  scene.state.info.n_ubatch = 512;
  scene.config.max_num_seqs = 16;
  for (int i = 0; i < 400; ++i) {  // a call 2 ms, a prompt token 0.5 ms, a row 10 ms
    const int rows = 1 + i % 8;
    const int prefill = i % 2 == 0 ? 0 : 16 * (1 + i % 5);
    scene.state.cost.observe({prefill, rows, 0}, 0.002 + 0.0005 * prefill + 0.010 * rows);
  }
  scene.runs(0, numbers(1, 4), 3);
  scene.waits(numbers(10, 600));
  // Two will decode: 4 x 22 ms, less the 12 ms of who decodes now.
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "2x152");
  for (Token first = 1000; first < 3000; first += 1000) scene.waits(numbers(first, 600));
  // Four will: 4 x 42 ms less 12 ms.
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "2x312");
}

TEST_CASE("gaps between busy streams are bridged by dummy rows, as far as that pays") {
  Scene scene(KvLayout::kStreams, 160, 16);
  scene.runs(1, numbers(1, 4), 3);
  scene.runs(4, numbers(1, 4), 3);
  scene.runs(12, numbers(1, 4), 3);
  CHECK(scene.plan().micro_batches.at(0).filler_slots == std::vector<SeqId>{2, 3});
  scene.caches(2, numbers(1, 9), 1);
  CHECK(scene.plan().micro_batches.at(0).filler_slots == std::vector<SeqId>{2, 3});
  SUBCASE("by what a call and a row are measured to take") {
    const auto learn = [&](double call_s, double row_s) {
      for (int i = 0; i < 400; ++i) {
        const int rows = 1 + i % 8;
        const int prefill = i % 2 == 0 ? 0 : 16 * (1 + i % 5);
        scene.state.cost.observe({prefill, rows, 50 * (37 * i % 50)},
                                 call_s + row_s * (rows + prefill));
      }
    };
    learn(0.020, 0.002);  // a call costs ten rows
    CHECK(scene.plan().micro_batches.at(0).filler_slots ==
          std::vector<SeqId>{2, 3, 5, 6, 7, 8, 9, 10, 11});
    learn(0.002, 0.004);
    const StepPlan plan = scene.plan();
    CHECK(plan.micro_batches.at(0).filler_slots.empty());
  }
  SUBCASE("not where a dummy row could not be taken back") {
    scene.state.info.memory = MemoryKind::kRecurrent;
    CHECK(scene.plan().micro_batches.at(0).filler_slots.empty());
  }
}

TEST_CASE("a prompt's token takes the place of a dummy row in a call over streams") {
  Scene scene(KvLayout::kStreams, 16 * 64, 16);
  scene.state.info.max_outputs = 16;
  const auto calls = [&] {
    std::string text;
    for (const PlannedMicroBatch& batch : scene.plan().micro_batches) {
      if (!text.empty()) text += " | ";
      text += Scene::rows(batch);
      for (const SeqId slot : batch.filler_slots) text += " slot " + std::to_string(slot);
      if (batch.num_extra_outputs > 0) text += " +" + std::to_string(batch.num_extra_outputs);
    }
    return text;
  };
  scene.runs(0, numbers(1, 4), 3);
  SUBCASE("in a gap, which would cut the call") {
    Sequence& prompt = scene.runs(1, numbers(1, 40), 4);
    scene.runs(2, numbers(1, 4), 3);
    SUBCASE("beyond the chunk, with logits that nobody asks for") {
      CHECK(calls() == "2x16 | 1x1 2x1 3x1 +1");
    }
    SUBCASE("as the last of the prompt, whose own call then has no logits") {
      prompt.num_computed = 30;
      CHECK(calls() == "2x9 | 1x1 2x1 3x1");
      prompt.num_computed = 23;  // a token more than the chunk
      CHECK(calls() == "2x16 | 1x1 2x1 3x1");
    }
    SUBCASE("though the step has no chunk of it") {
      Sequence& other = scene.runs(3, numbers(1, 40), 4);
      CHECK(calls() == "2x16 | 1x1 2x1 3x1 +1");
      std::swap(scene.state.running[1], scene.state.running[3]);
      CHECK(calls() == "4x16 | 1x1 2x1 3x1 +1");
      CHECK(other.slot == 3);
    }
    SUBCASE("not one that is to be forked: its siblings take slots, dummy rows and all") {
      prompt.num_forks = 2;
      CHECK(calls() == "1x1 3x1 | 2x16");
    }
  }
  SUBCASE("among idle slots") {
    scene.runs(2, numbers(1, 40), 4);
    scene.runs(4, numbers(1, 4), 3);
    CHECK(calls() == "2x16 | 1x1 2x1 3x1 slot 1 slot 3 +1");
  }
  SUBCASE("beside the others, where more rows are faster") {
    scene.runs(1, numbers(1, 4), 3);
    scene.runs(2, numbers(1, 4), 3);
    scene.waits(numbers(60, 10));
    scene.config.max_num_seqs = 4;
    CHECK(calls() == "4x10 | 1x1 2x1 3x1");
    for (int i = 0; i < 5; ++i) {
      scene.state.call_times.observe(3, 0.060);
      scene.state.call_times.observe(4, 0.048);
    }
    CHECK(calls() == "4x9 | 1x1 2x1 3x1 4x1");
  }
}

TEST_CASE("then from who ranks last, who keeps its place in the queue") {
  Scene scene(KvLayout::kUnified, 12);
  scene.runs(0, numbers(1, 6), 5, 20);
  scene.runs(1, numbers(20, 8), 7, 20);
  const StepPlan plan = scene.plan();
  REQUIRE(plan.preemptions.size() == 1);
  CHECK(plan.preemptions[0]->request_id == 2);
  CHECK(Scene::rows(plan.micro_batches.at(0)) == "1x1");
}

TEST_CASE("who was preempted too often is the last to be again") {
  Scene scene(KvLayout::kUnified, 18);
  scene.runs(0, numbers(1, 6), 5, 20);
  scene.runs(1, numbers(20, 6), 5, 20);
  scene.runs(2, numbers(40, 9), 8, 20);
  scene.all[2]->num_preemptions = scene.config.max_preemptions;
  const StepPlan plan = scene.plan();
  REQUIRE(plan.preemptions.size() == 1);
  CHECK(plan.preemptions[0]->request_id == 2);
}

TEST_CASE("prompts are chunked by the target once the cost of steps is known") {
  Scene scene(KvLayout::kUnified, 4096);
  scene.state.info.n_ubatch = 512;
  scene.runs(0, numbers(1, 3), 2);
  scene.waits(std::vector<Token>(400, 9));
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x127");
  for (int i = 0; i < 40; ++i) {
    const std::int32_t prefill = 16 * (i % 9);
    const std::int32_t rows = 1 + i % 5;
    scene.state.cost.observe({prefill, rows, 0}, 0.010 + 0.001 * prefill + 0.002 * rows);
  }
  scene.config.target_itl_s = 0.114;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x99");  // 100 rows in all
  scene.config.target_itl_s = 0.020;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x63");
  scene.config.prefill_policy = PrefillPolicy::kLatency;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x15");
  scene.config.prefill_policy = PrefillPolicy::kThroughput;
  CHECK(Scene::rows(scene.plan().micro_batches.at(0)) == "1x1 2x400");
}

TEST_CASE("a plan changes nothing, and is the same each time") {
  Scene scene(KvLayout::kUnified, 20);
  scene.caches(2, numbers(60, 6), 3);
  scene.runs(0, numbers(1, 8), 7);
  scene.waits(numbers(30, 9));
  const StepPlan first = scene.plan();
  const StepPlan second = scene.plan();
  CHECK(first.evictions == second.evictions);
  REQUIRE(first.micro_batches.size() == second.micro_batches.size());
  CHECK(Scene::rows(first.micro_batches.at(0)) == Scene::rows(second.micro_batches.at(0)));
  CHECK(scene.state.kv.num_cells() == 13);
  CHECK(scene.state.waiting.size() == 1);
}

TEST_CASE("the cost of steps is learnt, and not forgotten in a long run of equal steps") {
  StepCost cost;
  const auto truth = [](const StepWork& work) {
    return 0.005 + 0.0008 * work.prefill_tokens + 0.003 * work.decode_rows +
           1e-7 * static_cast<double>(work.kv_tokens);
  };
  for (int i = 0; i < 60; ++i) {
    const StepWork work{32 * (i % 5), 1 + i % 16, 500 * (i % 7)};
    cost.observe(work, truth(work));
  }
  for (int i = 0; i < 5000; ++i) cost.observe({0, 8, 4000}, truth({0, 8, 4000}));
  CHECK(cost.is_ready());
  for (const StepWork work : {StepWork{128, 4, 1000}, StepWork{0, 16, 8000}, StepWork{64, 0, 64}}) {
    CHECK(cost.seconds(work) == doctest::Approx(truth(work)).epsilon(0.05));
  }
  CHECK(cost.seconds_per_prefill_token() == doctest::Approx(0.0008).epsilon(0.05));
}

}  // namespace
}  // namespace batchcore
