// SPDX-License-Identifier: Apache-2.0
// Which threads are inside a call of a method, by their stacks of Python.
#pragma once

#include <pybind11/pybind11.h>

namespace distorch {

// Adds two functions to the module. `code` is the code object of a method, and `parts` has the id()
// of objects.
//   calling(code, parts) -> set of the threads that run that method of one of these objects
//   calls_of_this_thread(code, parts) -> how many such calls this thread is inside of
void install_frame_walkers(pybind11::module_& module);

}  // namespace distorch
