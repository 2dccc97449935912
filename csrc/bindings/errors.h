// SPDX-License-Identifier: Apache-2.0
// C++ errors as the classes of distorch/errors.py.
#pragma once

#include <pybind11/pybind11.h>

namespace distorch {

// Adds `set_error_classes(placement, format, fetch)` to the module.
void install_error_thrower(pybind11::module_& module);

}  // namespace distorch
