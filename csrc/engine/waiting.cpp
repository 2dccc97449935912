// SPDX-License-Identifier: Apache-2.0
#include "engine/waiting.h"

#include <atomic>

#include "core/mutex.h"

namespace distorch {
namespace {

std::atomic<WaitWrapper> wait_wrapper{nullptr};

}  // namespace

void set_wait_wrapper(WaitWrapper wrapper) { wait_wrapper = wrapper; }

void waiting(const std::function<void()>& wait) {
  check_mutex_held(false);
  if (const WaitWrapper wrapper = wait_wrapper) {
    wrapper(wait);
  } else {
    wait();
  }
}

}  // namespace distorch
