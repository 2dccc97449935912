// SPDX-License-Identifier: Apache-2.0
// find_placements() and step_bound(): see Note [Finding a placement] and Note [A lower bound].
#pragma once

#include <pybind11/pybind11.h>

namespace distorch {

void install_placement(pybind11::module_& module);

}  // namespace distorch
