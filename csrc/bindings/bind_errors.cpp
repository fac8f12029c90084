#include "bindings/bind_errors.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>

#include <string>
#include <typeindex>
#include <unordered_map>
#include <vector>

#include "bindings/bindings.h"
#include "core/errors.h"

namespace batchcore::python {
namespace {

struct Row {
  const char* name;
  py::dict (*attributes)(const Error& error);
  std::exception_ptr sample;
};

struct Table {
  std::vector<std::string> names;
  std::unordered_map<std::type_index, Row> rows;

  template <typename T>
  void add(const char* name, const T& sample, py::dict (*attributes)(const Error& error)) {
    names.emplace_back(name);
    rows.emplace(typeid(T), Row{name, attributes, std::make_exception_ptr(sample)});
  }
};

py::dict no_attributes(const Error& /*error*/) { return {}; }

Table make_table() {
  using namespace py::literals;
  Table table;
  table.add("BatchcoreError", Error("sample"), no_attributes);
  table.add("ConfigError", ConfigError("sample"), no_attributes);
  table.add("ModelLoadError", ModelLoadError("sample"), no_attributes);
  table.add("InvalidRequestError", InvalidRequestError("sample"), no_attributes);
  table.add("PromptTooLongError", PromptTooLongError("sample", 9, 8), [](const Error& error) {
    const auto& typed = static_cast<const PromptTooLongError&>(error);
    return py::dict("num_tokens"_a = typed.num_tokens, "limit"_a = typed.limit);
  });
  table.add("QueueFullError", QueueFullError("sample", 7, 0.5), [](const Error& error) {
    const auto& typed = static_cast<const QueueFullError&>(error);
    return py::dict("capacity"_a = typed.capacity, "retry_after_s"_a = typed.retry_after_s);
  });
  table.add("EngineError", EngineError("sample"), no_attributes);
  table.add("EngineClosedError", EngineClosedError("sample"), no_attributes);
  table.add("DecodeError", DecodeError("sample", -3), [](const Error& error) {
    return py::dict("status"_a = static_cast<const DecodeError&>(error).status);
  });
  table.add("StaleViewError", StaleViewError("sample"), no_attributes);
  table.add("ViewInUseError", ViewInUseError("sample"), no_attributes);
  return table;
}

const Table& table() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Table> storage;
  return storage.call_once_and_store_result(make_table).get_stored();
}

// Imported at the first error, not at import: batchcore/__init__ imports this module.
const py::module_& errors_module() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::module_> storage;
  return storage.call_once_and_store_result([] { return py::module_::import("batchcore.errors"); })
      .get_stored();
}

py::object build(const Error& error) {
  const auto found = table().rows.find(typeid(error));
  // A type without a row is a defect that a test finds; its message must not get lost meanwhile.
  if (found == table().rows.end()) return errors_module().attr("BatchcoreError")(error.what());
  const Row& row = found->second;
  return errors_module().attr(row.name)(error.what(), **row.attributes(error));
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object object = build(error);
    PyErr_SetObject(py::type::handle_of(object).ptr(), object.ptr());
  }
}

}  // namespace

py::object to_python_error(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& typed) {
    return build(typed);
  } catch (const std::exception& other) {
    return errors_module().attr("EngineError")(other.what());
  } catch (...) {
    return errors_module().attr("EngineError")("unknown error");
  }
}

void bind_errors(py::module_& m) {
  py::register_local_exception_translator(&translate);
  // For the test that every C++ error has a Python twin.
  m.attr("_error_names") = py::tuple(py::cast(table().names));
  m.def(
      "_raise",
      [](const std::string& name) {
        for (const auto& [type, row] : table().rows) {
          if (name == row.name) std::rethrow_exception(row.sample);
        }
        throw py::key_error(name);
      },
      py::arg("name"));
}

}  // namespace batchcore::python
