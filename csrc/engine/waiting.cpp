#include "engine/waiting.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace distorch {
namespace {

std::atomic<WaitWrapper> wait_wrapper{nullptr};

}  // namespace

#ifdef DISTORCH_CHECK_LOCKS
namespace {

thread_local int locks_held = 0;

}  // namespace

void lock_taken() { ++locks_held; }
void lock_given_up() { --locks_held; }

void check_no_lock_held() {
  if (locks_held == 0) return;
  std::fputs("distorch: a thread that holds a lock of the engine may wait for the GIL\n", stderr);
  std::abort();
}
#endif

void set_wait_wrapper(WaitWrapper wrapper) { wait_wrapper = wrapper; }

void waiting(const std::function<void()>& wait) {
  check_no_lock_held();
  if (const WaitWrapper wrapper = wait_wrapper) {
    wrapper(wait);
  } else {
    wait();
  }
}

}  // namespace distorch
