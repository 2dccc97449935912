// SPDX-License-Identifier: Apache-2.0
// rehearse(): see Note [A rehearsal].
#pragma once

#include <pybind11/pybind11.h>

namespace distorch {

void install_rehearsal(pybind11::module_& module);

}  // namespace distorch
