#include "llama/memory_guard.h"

#include <ggml.h>

#include <charconv>
#include <cstdint>
#include <fstream>
#include <map>
#include <string>

#include "core/errors.h"

namespace batchcore {
namespace {

// llama.cpp keeps position, sequence set and shift of every cell beside its K and V.
constexpr double kBytesOfCellMetadata = 64;

}  // namespace

std::uint64_t available_host_bytes() {
  std::ifstream file("/proc/meminfo");
  for (std::string name, unit; file >> name;) {
    std::uint64_t kilobytes = 0;
    if (!(file >> kilobytes)) return 0;
    if (name == "MemAvailable:") return kilobytes * 1024;
    std::getline(file, unit);
  }
  return 0;
}

namespace {

double bytes_per_value(const std::string& type_name) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const auto type = static_cast<ggml_type>(i);
    if (ggml_blck_size(type) > 0 && type_name == ggml_type_name(type)) {
      return static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
    }
  }
  return 0;
}

// Bytes of K and V per cell over all layers, 0 where the metadata does not say it plainly.
double bytes_per_cell(const LlamaModel& model, const ContextParams& params) {
  const MemoryKind kind = model.memory_kind();
  const bool plain =
      kind == MemoryKind::kAttention || (kind == MemoryKind::kSlidingWindow && params.swa_full);
  const std::map<std::string, std::string> metadata = model.metadata();
  const std::string prefix = model.architecture() + ".attention.";
  if (!plain || metadata.contains(prefix + "kv_lora_rank")) return 0;
  const auto number = [&](const std::string& key, std::int32_t otherwise) {
    const auto found = metadata.find(prefix + key);
    if (found == metadata.end()) return otherwise;
    std::int32_t value = 0;
    const std::string& text = found->second;
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;  // 0 for an array of values per layer
  };
  if (model.n_head() <= 0) return 0;
  const std::int32_t head_size = model.n_embd() / model.n_head();
  const double values = number("head_count_kv", model.n_head());
  return model.n_layer() * values *
         (number("key_length", head_size) * bytes_per_value(params.type_k) +
          number("value_length", head_size) * bytes_per_value(params.type_v));
}

}  // namespace

void check_host_memory(const LlamaModel& model, const ContextParams& params) {
  const double cells = params.n_ctx;
  double needed = cells * kBytesOfCellMetadata;
  if (!params.offload_kqv || !model.uses_gpu()) needed += cells * bytes_per_cell(model, params);
  const auto available = static_cast<double>(available_host_bytes());
  if (available == 0 || needed <= available) return;
  const auto gib = [](double bytes) {
    const std::string text = std::to_string(bytes / (1024.0 * 1024.0 * 1024.0));
    return text.substr(0, text.find('.') + 2) + " GiB";
  };
  throw EngineError("no memory for a context of " + std::to_string(params.n_ctx) +
                    " cells: they need about " + gib(needed) + ", and " + gib(available) +
                    " are free; lower n_ctx, or use a smaller type_k and type_v");
}

}  // namespace batchcore
