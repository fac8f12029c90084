// One bind_* function per bound class or topic; module.cpp calls them in order of dependence.
#pragma once

#include <pybind11/pybind11.h>

namespace batchcore::python {

namespace py = pybind11;

/// build_info() and devices().
void bind_info(py::module_& m);

/// The translator of C++ errors; first, so that the others may throw.
void bind_errors(py::module_& m);

/// drain_log(): llama.cpp's log, for batchcore._log.
void bind_log(py::module_& m);

/// Model.
void bind_model(py::module_& m);

/// SamplingParams, Notifier, RequestChannel and Engine.
void bind_engine(py::module_& m);

/// SimulatedEngine, for batchcore.simulation.
void bind_sim(py::module_& m);

/// Batch, for batchcore.lowlevel.
void bind_batch(py::module_& m);

/// LowLevelContext and ResultView, for batchcore.lowlevel.
void bind_lowlevel(py::module_& m);

}  // namespace batchcore::python
