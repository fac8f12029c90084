// A scheduler's state under load, for timing plan(): sequences that decode behind 300 tokens each,
// and as long ones that wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/scheduler.h"

namespace batchcore::bench {

inline BackendInfo backend_info(std::int32_t num_slots, KvLayout layout) {
  BackendInfo info;
  info.n_vocab = 256;
  info.num_slots = num_slots;
  info.num_cells = num_slots * 1024;
  info.cells_per_slot = 1024;
  info.n_ubatch = 512;
  info.max_outputs = 512;
  info.layout = layout;
  return info;
}

/// With all slots taken, as in steady state, or with one free (`admits`). Sequences come from
/// `num_users` in turn, who have all been served alike; one user is nobody in particular.
class PlanScene {
 public:
  PlanScene(std::int32_t num_slots, std::int32_t num_queued, bool admits,
            std::int32_t num_users = 1)
      : state(backend_info(num_slots, KvLayout::kUnified)), scheduler(config_for(num_slots)) {
    if (num_users > 1) users_.clear();
    for (std::int32_t i = 0; i < num_users && num_users > 1; ++i) {
      users_.push_back(state.waiting.enter("user-" + std::to_string(i)));
    }
    for (std::int32_t i = 0; i < num_slots - (admits ? 1 : 0); ++i) {
      Sequence& sequence = add();
      sequence.slot = i;
      sequence.num_computed = kLength - 1;
      state.kv.open(i);
      state.kv.append(i, std::span(sequence.tokens).first(kLength - 1));
      state.running.push_back(&sequence);
    }
    for (std::int32_t i = 0; i < num_queued; ++i) state.waiting.push(&add());
    for (int i = 0; i < 200; ++i) {
      state.cost.observe({16 * (i % 9), num_slots, kLength * num_slots}, 0.02 + 0.001 * (i % 9));
      state.history.record(50 + i % 60);
    }
  }

  SchedulerState state;
  Scheduler scheduler;

 private:
  static constexpr std::int32_t kLength = 300;

  static SchedulerConfig config_for(std::int32_t num_slots) {
    SchedulerConfig config;
    config.max_num_seqs = num_slots;
    return config;
  }

  Sequence& add() {
    auto sequence = std::make_unique<Sequence>();
    sequence->request_id = all_.size() + 1;
    sequence->rank = {0, sequence->request_id, 0};
    sequence->user = users_[all_.size() % users_.size()];
    for (std::int32_t i = 0; i < kLength; ++i) {
      sequence->tokens.push_back(static_cast<Token>(random_() % 256));
    }
    sequence->num_prompt_tokens = kLength;
    sequence->max_tokens_total = kLength + 100;
    all_.push_back(std::move(sequence));
    return *all_.back();
  }

  std::mt19937 random_{1};
  std::vector<UserId> users_{0};
  std::vector<std::unique_ptr<Sequence>> all_;
};

}  // namespace batchcore::bench
