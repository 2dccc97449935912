// SPDX-License-Identifier: Apache-2.0
// Waits that may take long give up the lock of the host language (Python's GIL).
#pragma once

#include <functional>

namespace distorch {

// Note [Waiting for threads]
// A thread that waits for other threads, or for a device, must not hold the GIL, because what it
// waits for may need the GIL. A reader thread may free the last tensor over some memory, and Python
// knows that tensor. A kernel may wait for another kernel that a Python thread has yet to launch.
// `wrapper` releases the GIL, runs what it is given, and takes the GIL again.
// Never call waiting() while holding a mutex of ours. Taking the GIL again could then wait
// for a thread that has the GIL and wants that mutex: a dead-lock. Where the environment has
// DISTORCH_CHECK_LOCKS, the process aborts instead.
using WaitWrapper = void (*)(const std::function<void()>& wait);
void set_wait_wrapper(WaitWrapper wrapper);

// wait(), without the lock of the host language.
void waiting(const std::function<void()>& wait);

}  // namespace distorch
