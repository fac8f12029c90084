#include "llama/devices.h"

#include <ggml-backend.h>

#include <cstddef>

namespace batchcore {
namespace {

const char* type_name(enum ggml_backend_dev_type type) {
  switch (type) {
    case GGML_BACKEND_DEVICE_TYPE_CPU:
      return "cpu";
    case GGML_BACKEND_DEVICE_TYPE_GPU:
      return "gpu";
    case GGML_BACKEND_DEVICE_TYPE_IGPU:
      return "igpu";
    case GGML_BACKEND_DEVICE_TYPE_ACCEL:
      return "accel";
    case GGML_BACKEND_DEVICE_TYPE_META:
      return "meta";
  }
  return "unknown";
}

}  // namespace

std::vector<DeviceInfo> list_devices() {
  std::vector<DeviceInfo> devices;
  for (std::size_t i = 0; i < ggml_backend_dev_count(); ++i) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    ggml_backend_dev_memory(device, &free_bytes, &total_bytes);
    devices.push_back({
        .name = ggml_backend_dev_name(device),
        .description = ggml_backend_dev_description(device),
        .type = type_name(ggml_backend_dev_type(device)),
        .backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)),
        .memory_total_bytes = total_bytes,
        .memory_free_bytes = free_bytes,
    });
  }
  return devices;
}

std::vector<std::string> list_backends() {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < ggml_backend_reg_count(); ++i) {
    names.emplace_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
  }
  return names;
}

}  // namespace batchcore
