#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace batchcore {

/// One device that ggml can compute on. Memory is in bytes; 0 where the backend does not say.
struct DeviceInfo {
  std::string name;
  std::string description;
  /// "cpu", "gpu", "igpu", "accel" or "meta", after ggml's device types.
  std::string type;
  /// The ggml backend that offers it, e.g. "CPU", "CUDA".
  std::string backend;
  std::uint64_t memory_total_bytes = 0;
  std::uint64_t memory_free_bytes = 0;
};

/// All devices of all compiled backends. Asks the drivers, so it may take a while; any thread.
std::vector<DeviceInfo> list_devices();

/// Names of the compiled backends, e.g. {"CPU"}. Any thread.
std::vector<std::string> list_backends();

}  // namespace batchcore
