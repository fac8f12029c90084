// Counters of an engine, copied out as a whole after every step.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/fair_share.h"
#include "core/histogram.h"

namespace batchcore {

/// Seconds that the engine thread has spent, by what it did.
struct PhaseSeconds {
  double plan = 0.0;
  double decode = 0.0;  ///< inside the backend
  double sample = 0.0;
  double text = 0.0;  ///< detokenising, stop strings, bookkeeping
  double publish = 0.0;
};

struct Latencies {
  LogHistogram queue;  ///< submit to first slot
  LogHistogram ttft;   ///< submit to first token
  LogHistogram itl;    ///< token to token of a completion
  LogHistogram e2e;    ///< submit to end, of requests that ended with stop or length
};

/// Sequences that came with one priority.
struct TierCount {
  std::int32_t priority = 0;
  std::int32_t num_waiting = 0;
  std::int32_t num_running = 0;
};

struct EngineStats {
  static constexpr std::size_t kMaxTiers = 8;
  // Now.
  std::int32_t num_running = 0;
  std::int32_t num_waiting = 0;
  std::int32_t num_cells = 0;
  std::int32_t num_active_cells = 0;     ///< held by running sequences
  std::int32_t num_cached_cells = 0;     ///< held for their prefix only
  std::int32_t num_pinned = 0;           ///< prefixes that are kept until unpin()
  std::int64_t saved_bytes = 0;          ///< host memory of preempted sequences
  std::int64_t host_cache_bytes = 0;     ///< host memory of evicted prefixes
  std::uint32_t variant_operations = 0;  ///< Backend::variant_operations()
  bool is_paused = false;
  bool is_draining = false;
  std::int32_t num_active_users = 0;       ///< with requests that wait or run
  std::int32_t num_known_users = 0;        ///< and those whose past use is remembered
  std::int32_t batch_size_limit = 0;       ///< sequences that may run
  std::int32_t batch_size_knee = 0;        ///< beyond which throughput gains little
  std::array<TierCount, kMaxTiers> tiers;  ///< best first; the best kMaxTiers that have any
  std::int32_t num_tiers = 0;
  // The last step that computed something.
  std::int32_t step_decode_rows = 0;
  std::int32_t step_prefill_tokens = 0;
  double step_s = 0.0;  ///< inside the backend
  /// What a decode call is predicted to take: [once, per prefill token, per decode row, per KV
  /// token that a row attends to].
  std::array<double, 4> cost_s{};
  // Since the start.
  std::int64_t num_steps = 0;
  std::int64_t num_micro_batches = 0;
  std::int64_t num_rows = 0;            ///< rows of all micro-batches
  std::int64_t num_prompt_tokens = 0;   ///< of the requests that were admitted
  std::int64_t num_prefill_tokens = 0;  ///< computed in chunks, after a preemption once more
  std::int64_t num_decode_rows = 0;     ///< computed one per sequence and step, and drafts
  std::int64_t num_cached_tokens = 0;   ///< prompt tokens that a cached prefix saved
  std::int64_t num_host_tokens = 0;     ///< those of them that came from host memory
  std::int64_t num_filler_rows = 0;     ///< dummy rows that give calls a cheaper shape
  std::int64_t num_generated_tokens = 0;
  std::int64_t num_draft_tokens = 0;     ///< guessed and verified
  std::int64_t num_accepted_tokens = 0;  ///< those of them that saved a step
  // Padding, in the three senses that it has here.
  std::int64_t busy_slot_steps = 0;     ///< tokens of static batches
  std::int64_t idle_slot_steps = 0;     ///< slots of ended sequences, while their batch went on
  std::int64_t attention_needed = 0;    ///< key positions that rows attend to, over all layers
  std::int64_t attention_computed = 0;  ///< those that attention went over
  std::int64_t num_extra_outputs = 0;   ///< logits that nobody asked for
  std::int64_t num_preemptions = 0;
  std::int64_t num_slot_preemptions = 0;  ///< those of them for a better tier that waited
  std::int64_t num_slot_moves = 0;        ///< of running sequences, into a gap between others
  std::int64_t num_batch_size_increases = 0;
  std::int64_t num_batch_size_decreases = 0;
  std::int64_t num_refused = 0;  ///< submits that met a bound of the queue, or were shed
  std::int64_t num_shed = 0;     ///< those of them that would have waited longer than their timeout
  std::int64_t num_saves = 0;    ///< preemptions into host memory; the others are computed again
  std::int64_t num_evictions = 0;
  std::int64_t num_decode_failures = 0;
  std::int64_t num_interrupts = 0;     ///< decode calls cut short because all of it was cancelled
  std::int64_t num_rebuilds = 0;       ///< of the context, after the device had failed
  std::int64_t num_graphs_reused = 0;  ///< llama.cpp compute graphs that served again
  /// FairShare::service(): what users were charged, by a hash of their names.
  std::array<double, FairShare::kNumServiceBuckets> service{};
  std::array<std::int64_t, 5> num_finished{};  ///< requests by FinishReason
  PhaseSeconds seconds;
  Latencies latencies;
  LogHistogram step_tokens;  ///< rows that a step computed
};

}  // namespace batchcore
