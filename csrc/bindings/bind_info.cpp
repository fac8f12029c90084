#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "build_config.h"
#include "core/version.h"
#include "kernels/seam.h"
#include "llama/devices.h"

namespace batchcore::python {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = version();
  info["llama_cpp_version"] = kLlamaCppVersion;
  info["llama_cpp_commit"] = kLlamaCppCommit;
  info["compiler"] = kCompiler;
  info["build_type"] = kBuildType;
  py::list features;
  for (const char* const* feature = kCpuFeatures; *feature != nullptr; ++feature) {
    features.append(*feature);
  }
  info["kernels"] = kernels::active_name();
  info["cpu_features"] = std::move(features);
  info["backends"] = list_backends();
  return info;
}

py::list devices() {
  std::vector<DeviceInfo> found;
  {
    py::gil_scoped_release release;  // GPU drivers start up here
    found = list_devices();
  }
  py::list result;
  for (const DeviceInfo& device : found) {
    py::dict row;
    row["name"] = device.name;
    row["description"] = device.description;
    row["type"] = device.type;
    row["backend"] = device.backend;
    row["memory_total_bytes"] = device.memory_total_bytes;
    row["memory_free_bytes"] = device.memory_free_bytes;
    result.append(std::move(row));
  }
  return result;
}

}  // namespace

void bind_info(py::module_& m) {
  m.attr("__version__") = version();
  m.def("build_info", &build_info, "What this build was made of.");
  m.def("available_kernels", &kernels::active_name,
        "Instruction set of the kernels that this CPU runs, or ggml.");
  m.def("devices", &devices, "Devices that llama.cpp can compute on, with their memory now.");
}

}  // namespace batchcore::python
