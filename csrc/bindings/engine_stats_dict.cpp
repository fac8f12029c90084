#include "bindings/engine_stats_dict.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "engine/request.h"
#include "kernels/seam.h"

namespace batchcore::python {
namespace {

// Sum, then the count of each bucket as far as the last that has any.
py::tuple to_tuple(const LogHistogram& histogram) {
  std::size_t size = LogHistogram::kNumBuckets;
  while (size > 0 && histogram.count_in(size - 1) == 0) --size;
  std::vector<std::int64_t> counts(size);
  for (std::size_t i = 0; i < size; ++i) counts[i] = histogram.count_in(i);
  return py::make_tuple(histogram.sum(), py::tuple(py::cast(counts)));
}

}  // namespace

py::tuple histogram_bounds() {
  py::tuple bounds(LogHistogram::kNumBuckets + 1);
  for (std::size_t i = 0; i <= LogHistogram::kNumBuckets; ++i) {
    bounds[i] = LogHistogram::lower_bound(i);
  }
  return bounds;
}

py::dict to_dict(const EngineStats& s) {
  using namespace py::literals;
  py::dict finished;
  for (std::size_t i = 0; i < s.num_finished.size(); ++i) {
    finished[py::str(std::string(kFinishReasonNames[i]))] = s.num_finished[i];
  }
  py::list tiers;
  for (std::int32_t i = 0; i < s.num_tiers; ++i) {
    const TierCount& tier = s.tiers[static_cast<std::size_t>(i)];
    tiers.append(py::make_tuple(tier.priority, tier.num_waiting, tier.num_running));
  }
  py::list variant_operations;
  std::uint32_t bit = 1;
  for (const char* name : kernels::kVariantOperationNames) {
    if ((s.variant_operations & bit) != 0) variant_operations.append(name);
    bit <<= 1;
  }
  return py::dict(
      "variant_operations"_a = py::tuple(variant_operations), "num_running"_a = s.num_running,
      "num_waiting"_a = s.num_waiting, "num_cells"_a = s.num_cells,
      "num_active_cells"_a = s.num_active_cells, "num_cached_cells"_a = s.num_cached_cells,
      "num_steps"_a = s.num_steps, "num_micro_batches"_a = s.num_micro_batches,
      "num_pinned"_a = s.num_pinned, "saved_bytes"_a = s.saved_bytes,
      "host_cache_bytes"_a = s.host_cache_bytes, "step_decode_rows"_a = s.step_decode_rows,
      "step_prefill_tokens"_a = s.step_prefill_tokens, "step_s"_a = s.step_s,
      "cost_s"_a = py::tuple(py::cast(s.cost_s)), "num_host_tokens"_a = s.num_host_tokens,
      "padding"_a = py::dict(
          "busy_slot_steps"_a = s.busy_slot_steps, "idle_slot_steps"_a = s.idle_slot_steps,
          "attention_needed"_a = s.attention_needed, "attention_computed"_a = s.attention_computed,
          "num_rows"_a = s.num_rows, "num_filler_rows"_a = s.num_filler_rows,
          "num_extra_outputs"_a = s.num_extra_outputs),
      "num_interrupts"_a = s.num_interrupts, "num_rows"_a = s.num_rows,
      "num_prompt_tokens"_a = s.num_prompt_tokens, "num_prefill_tokens"_a = s.num_prefill_tokens,
      "num_decode_rows"_a = s.num_decode_rows, "num_cached_tokens"_a = s.num_cached_tokens,
      "num_draft_tokens"_a = s.num_draft_tokens, "num_accepted_tokens"_a = s.num_accepted_tokens,
      "num_generated_tokens"_a = s.num_generated_tokens, "num_preemptions"_a = s.num_preemptions,
      "num_saves"_a = s.num_saves, "num_evictions"_a = s.num_evictions,
      "num_decode_failures"_a = s.num_decode_failures, "num_rebuilds"_a = s.num_rebuilds,
      "num_graphs_reused"_a = s.num_graphs_reused, "num_finished"_a = finished,
      "plan_s"_a = s.seconds.plan, "decode_s"_a = s.seconds.decode, "sample_s"_a = s.seconds.sample,
      "text_s"_a = s.seconds.text, "publish_s"_a = s.seconds.publish, "is_paused"_a = s.is_paused,
      "is_draining"_a = s.is_draining, "num_active_users"_a = s.num_active_users,
      "num_known_users"_a = s.num_known_users, "batch_size_limit"_a = s.batch_size_limit,
      "batch_size_knee"_a = s.batch_size_knee,
      "num_batch_size_increases"_a = s.num_batch_size_increases,
      "num_batch_size_decreases"_a = s.num_batch_size_decreases, "num_refused"_a = s.num_refused,
      "num_shed"_a = s.num_shed, "num_slot_preemptions"_a = s.num_slot_preemptions,
      "num_slot_moves"_a = s.num_slot_moves, "service"_a = py::tuple(py::cast(s.service)),
      "tiers"_a = tiers,
      "latencies"_a =
          py::dict("queue"_a = to_tuple(s.latencies.queue), "ttft"_a = to_tuple(s.latencies.ttft),
                   "itl"_a = to_tuple(s.latencies.itl), "e2e"_a = to_tuple(s.latencies.e2e)),
      "step_tokens"_a = to_tuple(s.step_tokens));
}

}  // namespace batchcore::python
