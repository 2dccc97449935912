// SPDX-License-Identifier: Apache-2.0
#include "hook/errors.h"

#include <atomic>

namespace distorch {
namespace {

std::atomic<ErrorThrower> host_thrower{nullptr};

}  // namespace

void set_error_thrower(ErrorThrower thrower) { host_thrower = thrower; }

void throw_to_host(const Error& error) {
  if (ErrorThrower thrower = host_thrower) thrower(error);
  throw error;
}

}  // namespace distorch
