// A scheduler's state written down by hand, for tests with literal plans.
#pragma once

#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/scheduler.h"

namespace batchcore::testing {

inline BackendInfo scene_info(KvLayout layout, std::int32_t num_cells, std::int32_t num_slots) {
  BackendInfo backend;
  backend.n_vocab = 100;
  backend.num_slots = num_slots;
  backend.num_cells = num_cells;
  backend.cells_per_slot = layout == KvLayout::kUnified ? num_cells : num_cells / num_slots;
  backend.n_ubatch = 16;
  backend.max_outputs = 4;
  backend.layout = layout;
  return backend;
}

// A state written down by hand: sequences with given tokens, some of them computed.
struct Scene {
  explicit Scene(KvLayout layout = KvLayout::kUnified, std::int32_t num_cells = 64,
                 std::int32_t num_slots = 4)
      : state(scene_info(layout, num_cells, num_slots)) {
    config.max_num_seqs = 3;
  }

  Sequence& add(std::vector<Token> tokens, std::int32_t max_new, std::int32_t priority = 0) {
    auto sequence = std::make_unique<Sequence>();
    sequence->request_id = all.size() + 1;
    sequence->rank = {priority, sequence->request_id, 0};
    sequence->num_prompt_tokens = static_cast<std::int32_t>(tokens.size());
    sequence->max_tokens_total = sequence->num_prompt_tokens + max_new;
    sequence->tokens = std::move(tokens);
    all.push_back(std::move(sequence));
    return *all.back();
  }

  Sequence& waits(std::vector<Token> tokens, std::int32_t max_new = 4, std::int32_t priority = 0) {
    Sequence& sequence = add(std::move(tokens), max_new, priority);
    state.waiting.push(&sequence);
    return sequence;
  }

  Sequence& runs(SeqId slot, std::vector<Token> tokens, std::int32_t num_computed,
                 std::int32_t max_new = 4, std::int32_t priority = 0) {
    Sequence& sequence = add(std::move(tokens), max_new, priority);
    sequence.slot = slot;
    sequence.num_computed = num_computed;
    state.kv.open(slot);
    state.kv.append(slot, std::span(sequence.tokens).first(static_cast<std::size_t>(num_computed)));
    state.running.push_back(&sequence);
    return sequence;
  }

  void caches(SeqId slot, const std::vector<Token>& tokens, std::uint64_t last_used) {
    state.kv.open(slot);
    state.kv.append(slot, tokens);
    state.kv.set_cached(slot);
    state.last_used[static_cast<std::size_t>(slot)] = last_used;
  }

  [[nodiscard]] StepPlan plan() const { return Scheduler(config).plan(state); }

  // "1x2 3x1" is two tokens of request 1 and one of request 3.
  static std::string rows(const PlannedMicroBatch& batch) {
    std::string text;
    for (const PlannedRows& row : batch.rows) {
      if (!text.empty()) text += ' ';
      text += std::to_string(row.sequence->request_id);
      text += 'x';
      text += std::to_string(row.count);
    }
    return text;
  }

  SchedulerConfig config;
  SchedulerState state;
  std::vector<std::unique_ptr<Sequence>> all;
};

inline std::vector<Token> numbers(Token first, std::size_t count) {
  std::vector<Token> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

}  // namespace batchcore::testing
