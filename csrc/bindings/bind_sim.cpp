#include <pybind11/gil_safe_call_once.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/engine_options.h"
#include "bindings/engine_stats_dict.h"
#include "sim/sim_prompt.h"
#include "sim/simulated_engine.h"

namespace batchcore::python {
namespace {

using Requests = py::array_t<SimRequest, py::array::c_style>;

// Not at import, which must not load NumPy.
void register_dtypes() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<bool> done;
  done.call_once_and_store_result([] {
    PYBIND11_NUMPY_DTYPE(SimRequest, arrival_s, timeout_s, queue_timeout_s, num_prompt_tokens,
                         num_output_tokens, user, priority, prefix_group, num_shared_tokens, key);
    PYBIND11_NUMPY_DTYPE(SimOutcome, arrival_s, admitted_s, first_token_s, finished_s,
                         num_output_tokens, num_cached_tokens, num_preemptions, end);
    return true;
  });
}

BackendInfo backend_info(const py::dict& options) {
  const auto get = [&options](const char* key) { return options[key].cast<std::int32_t>(); };
  BackendInfo info;
  info.layout =
      by_name<KvLayout>("kv_layout", options["kv_layout"].cast<std::string>(),
                        {{"unified", KvLayout::kUnified}, {"streams", KvLayout::kStreams}});
  info.num_slots = get("num_slots");
  info.n_ubatch = get("n_ubatch");
  info.max_outputs = info.num_slots;
  const bool is_unified = info.layout == KvLayout::kUnified;
  info.cells_per_slot = is_unified ? get("n_ctx") : get("n_ctx") / info.num_slots;
  info.num_cells = is_unified ? get("n_ctx") : info.cells_per_slot * info.num_slots;
  if (info.cells_per_slot < 1) {
    throw ConfigError("n_ctx gives each of " + std::to_string(info.num_slots) +
                      " sequences no cell at all");
  }
  return info;
}

SimCost sim_cost(const py::dict& device) {
  const auto get = [&device](const char* key) { return device[key].cast<double>(); };
  return {get("base_s"),     get("prefill_token_s"), get("decode_row_s"),
          get("kv_token_s"), get("loose_row_s"),     get("copied_token_s")};
}

std::unique_ptr<SimulatedEngine> make_engine(const py::dict& device, const py::dict& context,
                                             const py::dict& engine) {
  return std::make_unique<SimulatedEngine>(
      SimOptions{backend_info(context), sim_cost(device), engine_config(engine), {}});
}

void replay(SimulatedEngine& engine, const Requests& requests) {
  const std::span<const SimRequest> all(requests.data(), static_cast<std::size_t>(requests.size()));
  const py::gil_scoped_release release;
  engine.replay(all);
}

// The array owns the vector, which is large.
py::array_t<SimOutcome> outcomes(const SimulatedEngine& engine) {
  register_dtypes();
  auto owned = std::make_unique<std::vector<SimOutcome>>(engine.outcomes());
  const std::vector<SimOutcome>& values = *owned;
  const py::capsule owner(owned.release(), [](void* pointer) {
    delete static_cast<std::vector<SimOutcome>*>(pointer);
  });
  return py::array_t<SimOutcome>(static_cast<py::ssize_t>(values.size()), values.data(), owner);
}

SimRequest one_of(const Requests& requests) {
  if (requests.size() != 1) throw InvalidRequestError("submit takes one request");
  return *requests.data();
}

std::vector<Token> prompt_of(const Requests& requests) {
  const SimRequest request = one_of(requests);
  check(request);
  return sim_prompt(request);
}

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_sim(py::module_& m) {
  m.def(
      "sim_request_dtype",
      [] {
        register_dtypes();
        return py::dtype::of<SimRequest>();
      },
      "Of the arrays that SimulatedEngine takes.");
  m.def("sim_prompt", &prompt_of, py::arg("request"), "The tokens of an array of one request.");

  py::class_<SimulatedEngine>(m, "SimulatedEngine",
                              "An engine on virtual time; see batchcore.simulation.")
      .def(py::init(&make_engine), py::arg("device"), py::arg("context"), py::arg("engine"))
      .def("user", &SimulatedEngine::user, py::arg("name"), ReleaseGil())
      .def(
          "submit",
          [](SimulatedEngine& engine, const Requests& requests) {
            const SimRequest request = one_of(requests);
            const py::gil_scoped_release release;
            return engine.submit(request);
          },
          py::arg("request"))
      .def("replay", &replay, py::arg("requests"))
      .def("reserve", &SimulatedEngine::reserve, py::arg("num_requests"), ReleaseGil())
      .def("run_until", &SimulatedEngine::run_until, py::arg("time"), ReleaseGil())
      .def("run_all", &SimulatedEngine::run_all, py::arg("max_steps"), ReleaseGil())
      .def("load",
           [](const SimulatedEngine& engine) {
             const py::gil_scoped_release release;
             const SimLoad load = engine.load();
             return std::pair(load.num_requests, load.num_tokens);
           })
      .def("outcomes", &outcomes)
      .def("stats", [](const SimulatedEngine& engine) { return to_dict(engine.stats()); })
      .def_property_readonly("now", py::cpp_function(&SimulatedEngine::now, ReleaseGil()))
      .def_property_readonly("num_outcomes",
                             py::cpp_function(&SimulatedEngine::num_outcomes, ReleaseGil()))
      .def_property_readonly("num_slots",
                             [](const SimulatedEngine& e) { return e.info().num_slots; })
      .def_property_readonly("num_cells",
                             [](const SimulatedEngine& e) { return e.info().num_cells; })
      .def_property_readonly("cells_per_slot",
                             [](const SimulatedEngine& e) { return e.info().cells_per_slot; });
}

}  // namespace batchcore::python
