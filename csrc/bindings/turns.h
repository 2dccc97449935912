// SPDX-License-Identifier: Apache-2.0
// Threads that change a module take turns.
#pragma once

#include <pybind11/pybind11.h>

namespace distorch {

// Adds a class and two functions to the module. `parts` has the id() of a module and of its parts.
//   Turn(parts, nested, error, called_back, elsewhere): for `with`. Waits for other threads that
//   have
//     a turn with one of these parts. Raises error(called_back) if this thread has one, unless
//     `nested`. Raises error(elsewhere) if it would wait while it has a turn with other parts.
//   has_turn(thread, parts) -> whether a thread has a turn with one of these parts
//   waiting_for_turn(parts) -> set of the threads that wait for one
void install_turns(pybind11::module_& module);

}  // namespace distorch
