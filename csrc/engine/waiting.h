// Waiting for something that may take long, as the process's host language wants it.
#pragma once

#include <functional>

namespace distorch {

// Note [Waiting for threads]
// Who waits for other threads, or for a device, must not keep the lock of the host language
// (Python's GIL): what is waited for may need it. A reader may be letting go of the last tensor
// over some memory, which Python knows; a kernel may wait for one that another Python thread has
// yet to launch. `wrapper` runs what it is given without that lock.
// So nobody may call waiting() with a lock of ours held: to get the lock of the host language back
// while another thread holds it, and waits for ours, would be a dead-lock.
using WaitWrapper = void (*)(const std::function<void()>& wait);
void set_wait_wrapper(WaitWrapper wrapper);

// wait(), without the lock of the host language.
void waiting(const std::function<void()>& wait);

}  // namespace distorch
