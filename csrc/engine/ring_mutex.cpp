// SPDX-License-Identifier: Apache-2.0
#include "engine/ring_mutex.h"

#include <cstddef>
#include <new>
#include <utility>

namespace distorch {

void RingMutex::let_go(Source source) noexcept {
  try {
    let_go_.push_back(std::move(source));
  } catch (const std::bad_alloc&) {
    // There is no memory to remember it, and it must not end here. So it never ends.
    alignas(Source) static std::byte never_destroyed[sizeof(Source)];
    new (never_destroyed) Source(std::move(source));
  }
}

void RingMutex::unlock() {
  std::vector<Source> sources = std::exchange(let_go_, {});
  Mutex::unlock();
  for (Source& source : sources) distorch::let_go(std::move(source));
}

void RingMutex::wait() {
  if (let_go_.empty()) return changed_->wait(*this);
  unlock();  // lets go of these sources; nobody else would while this thread waits
  lock();
}

// The old condition is leaked: it still counts the threads that waited.
void RingMutex::start_afresh() {
  Mutex::start_afresh();
  static_cast<void>(changed_.release());
  changed_ = std::make_unique<Condition>();
}

}  // namespace distorch
