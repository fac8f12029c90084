// One bind_* function per bound class or topic; module.cpp calls them in order of dependence.
#pragma once

#include <pybind11/pybind11.h>

namespace batchcore::python {

namespace py = pybind11;

/// build_info() and devices().
void bind_info(py::module_& m);

}  // namespace batchcore::python
