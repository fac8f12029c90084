// batchcore._cpu: refuses to import where _core would die of an illegal instruction.
//
// It is a module of its own because a check inside _core would come too late: when _core is loaded,
// static initialisers run before any of its functions, and the linker may have given them code that
// was compiled for a newer CPU.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "build_config.h"
#include "cpu/cpu_features.h"
#include "cpu/tile_check.h"

namespace {

bool usable(const char* feature) {
  // A test's way to run on a CPU that lacks something.
  const char* missing = std::getenv("BATCHCORE_TEST_MISSING_FEATURE");
  if (missing != nullptr && std::strcmp(missing, feature) == 0) return false;
  if (!batchcore::cpu_reports(feature)) return false;
  return std::strcmp(feature, "amx_tile") != 0 || batchcore::tiles_execute();
}

int execute(PyObject* module) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return -1;
  for (const char* const* feature = batchcore::kCpuFeatures; *feature != nullptr; ++feature) {
    if (!usable(*feature)) {
      Py_DECREF(names);
      PyErr_Format(PyExc_ImportError,
                   "batchcore was built for CPUs with %s, which this one does not have. Rebuild it "
                   "on this machine: "
                   "pip install --force-reinstall --no-cache-dir --no-binary batchcore batchcore "
                   "(or pip install . "
                   "in a clone). For a build that runs on any x86-64 CPU with SSE4.2, add "
                   "-C cmake.define.BATCHCORE_PORTABLE=ON",
                   *feature);
      return -1;
    }
    PyObject* name = PyUnicode_FromString(*feature);
    const int failed = name == nullptr ? -1 : PyList_Append(names, name);
    Py_XDECREF(name);
    if (failed != 0) {
      Py_DECREF(names);
      return -1;
    }
  }
  PyObject* features = PyList_AsTuple(names);
  Py_DECREF(names);
  if (features == nullptr) return -1;
  const int failed = PyModule_AddObjectRef(module, "features", features);
  Py_DECREF(features);
  return failed;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&execute)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_cpu",
    "The CPU features that batchcore was compiled for, all present on this machine.",
    0,
    nullptr,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&definition); }
