// SPDX-License-Identifier: Apache-2.0
// Where the errors of the engine leave C++.
#pragma once

#include <new>

#include "core/error.h"

namespace distorch {

// Throws what the host language understands; never returns.
using ErrorThrower = void (*)(const Error&);
void set_error_thrower(ErrorThrower thrower);
[[noreturn]] void throw_to_host(const Error& error);

// Runs `body`; errors of the engine come out as the host's own.
template <class Body>
decltype(auto) at_border(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw_to_host(error);
  } catch (const std::bad_alloc&) {
    throw_to_host(Error(ErrorKind::kFetch, "there is no memory left for what a weight needs"));
  }
}

}  // namespace distorch
