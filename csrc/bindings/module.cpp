#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of batchcore. Use it through the batchcore package.";
  batchcore::python::bind_errors(m);
  batchcore::python::bind_info(m);
  batchcore::python::bind_log(m);
  batchcore::python::bind_model(m);
  batchcore::python::bind_batch(m);
  batchcore::python::bind_lowlevel(m);
  batchcore::python::bind_engine(m);
  batchcore::python::bind_sim(m);
}
