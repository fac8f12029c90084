#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "llama/llama_log.h"

namespace batchcore::python {
namespace {

py::tuple drain_log() {
  DrainedLog drained;
  {
    const py::gil_scoped_release release;  // a thread that logs may hold the buffer's lock
    drained = drain_llama_log();
  }
  py::list lines;
  for (const LogLine& line : drained.lines) {
    // What llama.cpp prints of a file's metadata need not be UTF-8.
    lines.append(py::make_tuple(
        static_cast<int>(line.level),
        py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
            line.text.data(), static_cast<py::ssize_t>(line.text.size()), "replace"))));
  }
  return py::make_tuple(std::move(lines), drained.dropped);
}

}  // namespace

void bind_log(py::module_& m) {
  m.def("drain_log", &drain_log,
        "Lines of llama.cpp's log since the last call, as (level, text), and how many were lost.");
  m.def(
      "set_log_level", [](int level) { set_llama_log_level(static_cast<LogLevel>(level)); },
      py::arg("level"), "Keep lines from this level: 1 debug, 2 info, 3 warning, 4 error.");
}

}  // namespace batchcore::python
