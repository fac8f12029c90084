#include "core/waiting_queue.h"

#include <doctest/doctest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/queue_cursor.h"
#include "core/tier_limits.h"
#include "sim_engine.h"

namespace batchcore {
namespace {

using testing::request;
using testing::SimEngine;
using testing::SimOptions;
using Tokens = std::vector<Token>;

struct Waiting {
  explicit Waiting(double aging_s = 0.0) : queue({aging_s, {}}) {}

  Sequence& make(const std::string& user, std::int32_t priority = 0, std::size_t num_tokens = 10) {
    all.push_back(std::make_unique<Sequence>());
    Sequence& sequence = *all.back();
    sequence.request_id = all.size();
    sequence.rank = {priority, all.size(), 0};
    sequence.tokens.assign(num_tokens, 1);
    sequence.num_prompt_tokens = static_cast<std::int32_t>(num_tokens);
    sequence.user = queue.enter(user);
    return sequence;
  }
  Sequence& add(const std::string& user, std::int32_t priority = 0, std::size_t num_tokens = 10,
                double now = 0.0) {
    Sequence& sequence = make(user, priority, num_tokens);
    queue.push(&sequence, now);
    return sequence;
  }

  // Request ids in the order in which they are admitted, each charged for its prompt.
  [[nodiscard]] std::string order() const {
    std::string text;
    QueueCursor cursor(queue);
    while (const Sequence* sequence = cursor.next()) {
      if (!text.empty()) text += ' ';
      text += std::to_string(sequence->request_id);
      if (sequence->num_preemptions == 0) cursor.charge(sequence->num_prompt_tokens);
    }
    return text;
  }

  WaitingQueue queue;
  std::vector<std::unique_ptr<Sequence>> all;
};

TEST_CASE("one user's requests go by arrival, and all users' alike where nobody got more") {
  Waiting waiting;
  for (int i = 0; i < 4; ++i) waiting.add("");
  CHECK(waiting.order() == "1 2 3 4");
  Waiting users;
  for (const char* user : {"a", "b", "c"}) users.add(user);
  CHECK(users.order() == "1 2 3");
}

TEST_CASE("users take turns by what they got, as if those before were admitted") {
  Waiting waiting;
  for (int i = 0; i < 3; ++i) waiting.add("a", 0, 20);  // 1 2 3
  for (int i = 0; i < 4; ++i) waiting.add("b", 0, 10);  // 4 5 6 7
  // a 0, b 0 | a 20 | b 10 | b 20, a came first | a 40, b 20 | b 30 | b 40, a came first
  CHECK(waiting.order() == "1 4 5 2 6 7 3");
  CHECK(waiting.order() == "1 4 5 2 6 7 3");  // going through changes nothing
  waiting.queue.charge(waiting.all[0]->user, 15);
  CHECK(waiting.order() == "4 5 1 6 7 2 3");
  CHECK_FALSE(waiting.queue.check_integrity());
}

TEST_CASE("better tiers go first, whatever their numbers, and what a user got there counts") {
  Waiting waiting;
  waiting.add("a", 2'000'000'000);
  waiting.add("a", 0);
  waiting.add("b", 0);
  waiting.add("a", -2'000'000'000, 30);
  CHECK(waiting.order() == "4 3 2 1");
  CHECK(waiting.queue.best_priority() == -2'000'000'000);
}

TEST_CASE("the earliest deadline of a user goes first, then those without by arrival") {
  Waiting waiting;
  for (const double deadline : {30.0, 10.0, 20.0}) {
    Sequence& sequence = waiting.make("a");
    sequence.deadline = deadline;
    waiting.queue.push(&sequence);
  }
  waiting.add("a");
  waiting.add("a");
  CHECK(waiting.order() == "2 3 1 4 5");
  Sequence& other = waiting.make("b");
  other.deadline = 1.0;
  waiting.queue.push(&other);
  CHECK(waiting.order() == "2 6 3 1 4 5");  // no deadline takes another user's turn
}

TEST_CASE("who was preempted goes before all of its tier that were not, by rank") {
  Waiting waiting;
  waiting.add("a");
  Sequence& second = waiting.make("b");
  Sequence& third = waiting.make("b");
  waiting.add("c", -1);
  waiting.queue.charge(second.user, 1000);
  for (Sequence* sequence : {&third, &second}) {
    sequence->num_preemptions = 1;
    waiting.queue.push(sequence);
  }
  CHECK(waiting.order() == "4 2 3 1");
  CHECK(waiting.queue.num_preempted() == 2);
  QueueCursor only(waiting.queue, true);
  CHECK(only.next() == &second);
  CHECK(only.next() == &third);
  CHECK(only.next() == nullptr);
}

TEST_CASE("waiting counts a tier per aging_s, up to the best that others wait in") {
  Waiting waiting(10.0);
  Sequence& low = waiting.add("a", 3, 10, 0.0);
  waiting.queue.age(100.0);
  CHECK(low.effective_tier() == 3);  // nobody is before it
  waiting.add("b", 1, 10, 100.0);
  waiting.queue.age(109.0);
  CHECK(waiting.order() == "2 1");
  waiting.queue.age(110.0);
  CHECK(low.effective_tier() == 2);
  waiting.queue.age(120.0);
  CHECK(low.effective_tier() == 1);
  CHECK(waiting.order() == "1 2");
  waiting.queue.age(1000.0);
  CHECK(low.effective_tier() == 1);
  CHECK_FALSE(waiting.queue.check_integrity());
  // What it has gained it keeps.
  CHECK(waiting.queue.erase(&low));
  CHECK_FALSE(waiting.queue.erase(&low));
  waiting.queue.push(&low, 1000.0);
  CHECK(low.effective_tier() == 1);
}

TEST_CASE("who has aged goes before the deadlines of its user") {
  Waiting waiting(10.0);
  waiting.add("a");
  Sequence& urgent = waiting.make("a");
  urgent.deadline = 50.0;
  waiting.queue.push(&urgent, 5.0);
  CHECK(waiting.order() == "2 1");
  waiting.queue.age(10.0);
  CHECK(waiting.order() == "1 2");
}

TEST_CASE("aging undoes no fair share inside a tier") {
  Waiting waiting(10.0);
  for (int i = 0; i < 50; ++i) waiting.add("flood", 0, 10, 0.0);
  waiting.queue.age(500.0);
  waiting.add("quiet", 0, 10, 500.0);
  waiting.add("quiet", 0, 10, 500.0);
  CHECK(waiting.order().substr(0, 12) == "1 51 2 52 3 ");
}

TEST_CASE("ten thousand that age at once are lifted a bounded number per step") {
  Waiting waiting(10.0);
  waiting.add("", 0, 1, 0.0);
  for (int i = 0; i < 1000; ++i) waiting.add("", 1, 1, 0.0);
  const auto lifted = [&waiting] {
    int count = 0;
    for (const auto& sequence : waiting.all) count += sequence->lift;
    return count;
  };
  waiting.queue.age(11.0);
  CHECK(lifted() > 0);
  CHECK(lifted() < 300);
  for (int i = 0; i < 5; ++i) waiting.queue.age(11.0);
  CHECK(lifted() == 1000);
}

TEST_CASE("a cursor leaves out who it is told to") {
  Waiting waiting;
  for (int i = 0; i < 3; ++i) waiting.add("a");  // 1 2 3
  waiting.add("b");
  waiting.add("b", 1);
  for (const auto& sequence : waiting.all) REQUIRE(waiting.queue.erase(sequence.get()));
  for (const auto& sequence : waiting.all) {
    sequence->tier_group = sequence->request_id == 3 ? 1 : 0;
    waiting.queue.push(sequence.get());
  }
  QueueCursor by_user(waiting.queue);
  CHECK(by_user.next()->request_id == 1);
  by_user.leave_user();
  CHECK(by_user.next()->request_id == 3);  // limited otherwise
  CHECK(by_user.next()->request_id == 4);
  QueueCursor by_group(waiting.queue);
  CHECK(by_group.next()->request_id == 1);
  by_group.leave_group(0);
  CHECK(by_group.next()->request_id == 3);
  CHECK(by_group.next() == nullptr);
}

TEST_CASE("random pushes, charges and ages keep the account") {
  std::mt19937 random(4);
  for (const double aging : {0.0, 3.0}) {
    Waiting waiting(aging);
    std::vector<Sequence*> in;
    for (int i = 0; i < 5000; ++i) {
      if (in.empty() || random() % 2 == 0) {
        const std::string user(1, static_cast<char>('a' + random() % 5));
        Sequence& sequence = waiting.make(user, static_cast<int>(random() % 4), 1 + random() % 9);
        sequence.tier_group = static_cast<std::int32_t>(random() % 2);
        sequence.num_preemptions = random() % 5 == 0 ? 1 : 0;
        if (random() % 3 == 0) sequence.deadline = static_cast<double>(random() % 100);
        waiting.queue.push(&sequence, 0.01 * i);
        in.push_back(&sequence);
      } else if (random() % 3 == 0) {
        waiting.queue.charge(in[random() % in.size()]->user,
                             1.0 + static_cast<double>(random() % 9));
      } else {
        std::swap(in[random() % in.size()], in.back());
        REQUIRE(waiting.queue.erase(in.back()));
        waiting.queue.leave(in.back()->user);
        in.pop_back();
      }
      waiting.queue.age(0.01 * i);
      if (i % 20 != 0) continue;
      REQUIRE_FALSE(waiting.queue.check_integrity());
      std::size_t seen = 0;
      QueueCursor cursor(waiting.queue);
      while (cursor.next() != nullptr) {
        seen += 1;
        if (random() % 2 == 0) cursor.charge(static_cast<double>(random() % 9));
      }
      REQUIRE(seen == in.size());
    }
  }
}

TEST_CASE("a low tier starves beside a busy high one, unless it ages") {
  for (const double aging : {0.0, 1.0}) {
    SimOptions options;
    options.max_num_seqs = 2;
    options.adjust = [aging](EngineConfig& config) { config.scheduler.queue.aging_s = aging; };
    SimEngine sim(options);
    for (int i = 0; i < 8; ++i) (void)sim.engine.submit(request({4, 5}, 10));
    sim.engine.step();
    RequestSpec low = request({1, 2, 3}, 4);
    low.priority = 3;
    const auto starving = sim.engine.submit(low);
    for (int i = 0; i < 3000 && !starving->is_finished(); ++i) {
      while (sim.engine.stats().num_waiting < 8) {
        (void)sim.engine.submit(request({4, 5, static_cast<Token>(1 + i % 60)}, 10));
        sim.engine.step();
        if (starving->is_finished()) break;
      }
      sim.engine.step();
    }
    if (aging == 0.0) {
      CHECK_FALSE(starving->is_finished());
    } else {
      REQUIRE(starving->is_finished());
      const RequestMetrics metrics = testing::collect(*starving).metrics;
      // Three tiers, and the end of a request that runs.
      CHECK(metrics.admitted_s - metrics.arrival_s >= 3.0);
      CHECK(metrics.admitted_s - metrics.arrival_s < 3.5);
    }
  }
}

}  // namespace
}  // namespace batchcore
