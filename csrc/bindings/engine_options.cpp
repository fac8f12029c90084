#include "bindings/engine_options.h"

#include <pybind11/stl.h>

#include <tuple>
#include <unordered_map>
#include <vector>

namespace batchcore::python {
namespace {

std::vector<TierLimit> tier_limits(const py::object& values) {
  using Limit = std::tuple<std::int32_t, std::int32_t, std::int32_t>;
  std::vector<TierLimit> limits;
  for (const auto& [tier, max_num_seqs, reserved_seqs] : values.cast<std::vector<Limit>>()) {
    limits.push_back({tier, max_num_seqs, reserved_seqs});
  }
  return limits;
}

QueueConfig queue_config(const py::dict& options) {
  const auto get = [&options](const char* key) { return options[key]; };
  QueueConfig config;
  config.aging_s = get("aging_s").cast<double>();
  config.fair_share.prompt_token_cost = get("prompt_token_cost").cast<double>();
  config.fair_share.output_token_cost = get("output_token_cost").cast<double>();
  config.fair_share.user_weights =
      get("user_weights").cast<std::unordered_map<std::string, double>>();
  return config;
}

}  // namespace

EngineConfig engine_config(const py::dict& options) {
  const auto get = [&options](const char* key) { return options[key]; };
  EngineConfig config;
  config.scheduler.max_num_seqs = get("max_num_seqs").cast<std::int32_t>();
  config.scheduler.prefill_policy =
      by_name<PrefillPolicy>("prefill_policy", get("prefill_policy").cast<std::string>(),
                             {{"latency", PrefillPolicy::kLatency},
                              {"balanced", PrefillPolicy::kBalanced},
                              {"throughput", PrefillPolicy::kThroughput}});
  config.scheduler.preemption =
      by_name<PreemptionMode>("preemption", get("preemption").cast<std::string>(),
                              {{"auto", PreemptionMode::kAuto},
                               {"recompute", PreemptionMode::kRecompute},
                               {"save", PreemptionMode::kSave}});
  config.max_saved_bytes = get("max_saved_bytes").cast<std::size_t>();
  config.host_cache_bytes = get("host_cache_bytes").cast<std::size_t>();
  config.scheduler.target_itl_s = get("target_itl_s").cast<double>();
  config.scheduler.prefix_caching = get("prefix_caching").cast<bool>();
  config.max_queued_requests = get("max_queued_requests").cast<std::int64_t>();
  config.max_queued_tokens = get("max_queued_tokens").cast<std::int64_t>();
  config.max_sequence_tokens = get("max_sequence_tokens").cast<std::int32_t>();
  config.max_queued_requests_per_user = get("max_queued_requests_per_user").cast<std::int64_t>();
  config.max_queued_tokens_per_user = get("max_queued_tokens_per_user").cast<std::int64_t>();
  config.shed = get("shed").cast<bool>();
  config.scheduler.preempt_for_slots = get("preempt_for_slots").cast<bool>();
  config.scheduler.max_wait_s = get("max_wait_s").cast<double>();
  config.scheduler.adaptive = get("adaptive").cast<bool>();
  config.scheduler.num_speculative_tokens = get("num_speculative_tokens").cast<std::int32_t>();
  config.scheduler.tier_limits = tier_limits(get("tier_limits"));
  config.scheduler.queue = queue_config(options);
  config.num_sampler_threads = get("num_sampler_threads").cast<std::int32_t>();
  config.check_integrity = get("check_integrity").cast<bool>();
  return config;
}

}  // namespace batchcore::python
