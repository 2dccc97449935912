// SPDX-License-Identifier: Apache-2.0
#include "bindings/errors.h"

#include <torch/csrc/Exceptions.h>

#include <array>

#include "core/mutex.h"
#include "hook/errors.h"

namespace py = pybind11;

namespace distorch {
namespace {

// Indexed by ErrorKind; references that live as long as the process.
std::array<PyObject*, 3> error_classes{};

// PyTorch carries a python_error across its threads and language borders and
// raises it unchanged.
void throw_python_error(const Error& error) {
  PyObject* error_class = error_classes.at(static_cast<size_t>(error.kind()));
  if (error_class == nullptr) return;
  check_mutex_held(false);
  py::gil_scoped_acquire gil;
  PyErr_SetString(error_class, error.what());
  python_error carried;
  carried.persist();
  throw carried;
}

}  // namespace

void install_error_thrower(py::module_& module) {
  module.def("set_error_classes", [](py::object placement, py::object format, py::object fetch) {
    error_classes = {placement.release().ptr(), format.release().ptr(), fetch.release().ptr()};
    set_error_thrower(&throw_python_error);
  });
}

}  // namespace distorch
