// An engine over a SimBackend on virtual time, driven step by step, for the tests.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/sim_backend.h"
#include "engine/engine.h"

namespace batchcore::testing {

inline constexpr Token kEndToken = 0;

/// 64 tokens: an end of generation, then one printable character each.
inline std::shared_ptr<const Vocab> small_vocab() {
  auto vocab = std::make_shared<Vocab>();
  vocab->add_piece("");
  for (int token = 1; token < 64; ++token)
    vocab->add_piece(std::string(1, static_cast<char>(' ' + token)));
  vocab->add_end_of_generation(kEndToken);
  return vocab;
}

struct SimOptions {
  KvLayout layout = KvLayout::kUnified;
  MemoryKind memory = MemoryKind::kAttention;
  std::int32_t num_slots = 8;
  std::int32_t max_num_seqs = 4;
  std::int32_t num_cells = 256;
  std::int32_t cells_per_slot = 0;  ///< 0: what the layout gives
  std::int32_t n_ubatch = 32;
  std::int32_t row_group = BackendInfo{}.row_group;
  bool prefix_caching = true;
  PreemptionMode preemption = PreemptionMode::kAuto;
  std::int64_t max_queued_requests = 1000;
  std::size_t host_cache_bytes = 0;
  SimCost cost = {};
  std::function<void(EngineConfig&)> adjust;  ///< sets what else a test wants
};

inline BackendInfo sim_info(const SimOptions& options) {
  BackendInfo info;
  info.n_vocab = 64;
  info.num_slots = options.num_slots;
  info.num_cells = options.num_cells;
  info.cells_per_slot = options.layout == KvLayout::kUnified
                            ? options.num_cells
                            : options.num_cells / options.num_slots;
  if (options.cells_per_slot > 0) info.cells_per_slot = options.cells_per_slot;
  info.n_ubatch = options.n_ubatch;
  info.max_outputs = options.n_ubatch;
  info.row_group = options.row_group;
  info.layout = options.layout;
  info.memory = options.memory;
  return info;
}

inline EngineConfig sim_config(const SimOptions& options) {
  EngineConfig config;
  config.scheduler.max_num_seqs = options.max_num_seqs;
  config.scheduler.prefix_caching = options.prefix_caching;
  config.scheduler.preemption = options.preemption;
  config.max_saved_bytes = std::size_t{1} << 20;
  config.host_cache_bytes = options.host_cache_bytes;
  config.max_queued_requests = options.max_queued_requests;
  config.max_queued_tokens = 1'000'000;
  config.check_integrity = true;
  if (options.adjust) options.adjust(config);
  return config;
}

/// Fails where a test wants it to: `fault` says what becomes of a decode call before it is made.
struct FaultyBackend : SimBackend {
  using SimBackend::SimBackend;

  DecodeStatus decode(const MicroBatch& batch) override {
    const DecodeStatus status = fault ? fault(batch) : DecodeStatus::kOk;
    if (status == DecodeStatus::kOk) {
      const DecodeStatus real = SimBackend::decode(batch);
      num_refused += real == DecodeStatus::kOk ? 0 : 1;
      return real;
    }
    if (leaves_a_part) {
      MicroBatch part;
      const std::size_t half = (batch.size() + 1) / 2;
      for (std::size_t i = 0; i < half; ++i) {
        part.add(batch.tokens[i], batch.positions[i], batch.seq_ids[i], false);
      }
      (void)SimBackend::decode(part);
    }
    return status;
  }
  bool rebuild() override {
    for (SeqId slot = 0; slot < info().num_slots; ++slot) remove(slot, 0, -1);
    return true;
  }

  std::function<DecodeStatus(const MicroBatch&)> fault;
  bool leaves_a_part = false;
  int num_refused = 0;  ///< calls that the engine should not have made
};

struct SimEngine {
  explicit SimEngine(const SimOptions& options = {})
      : SimEngine(std::make_unique<SimBackend>(sim_info(options), options.cost), options) {}

  SimEngine(std::unique_ptr<SimBackend> owned, const SimOptions& options)
      : backend(owned.get()), engine(std::move(owned), small_vocab(), sim_config(options), [this] {
          return backend->now() + skipped;
        }) {}

  /// Steps until nothing is left; false where that takes more than `limit` steps.
  bool run(int limit = 100'000) {
    while (engine.has_work()) {
      if (limit-- == 0) return false;
      const double before = backend->now();
      engine.step();
      if (backend->now() == before) skipped += 1e-3;  // held back until some time
    }
    return true;
  }

  SimBackend* backend;
  double skipped = 0.0;  ///< seconds added to the clock
  Engine engine;
};

inline RequestSpec request(std::vector<Token> prompt, std::int32_t max_tokens) {
  RequestSpec spec;
  spec.prompt = std::move(prompt);
  spec.sampling.max_tokens = max_tokens;
  return spec;
}

/// Everything that a finished request has given, by completion.
struct Result {
  std::vector<CompletionDelta> completions;
  std::exception_ptr error;
  RequestMetrics metrics;
};

inline Result collect(RequestChannel& channel) {
  Result result;
  if (auto update = channel.take()) {
    result.completions = std::move(update->deltas);
    result.error = update->error;
    result.metrics = update->metrics;
  }
  return result;
}

}  // namespace batchcore::testing
