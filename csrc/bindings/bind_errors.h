// C++ errors to Python ones. Each type in core/errors.h has one row in bind_errors.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace batchcore::python {

/// The Python exception object of a C++ error: the class of the same name in batchcore.errors, with
/// its attributes. Any other exception becomes an EngineError. Needs the GIL.
[[nodiscard]] pybind11::object to_python_error(const std::exception_ptr& error);

}  // namespace batchcore::python
