#include "engine/ring_mutex.h"

#include <utility>

#include "engine/waiting.h"

namespace distorch {

void RingMutex::Lock::lock() {
  held_.lock();
  lock_taken();
}

void RingMutex::Lock::unlock() {
  std::vector<Source> sources = std::exchange(mutex_.let_go_, {});
  lock_given_up();
  held_.unlock();
  for (Source& source : sources) distorch::let_go(std::move(source));
}

void RingMutex::Lock::wait() {
  if (mutex_.let_go_.empty()) return mutex_.changed_->wait(held_);
  unlock();  // lets go of these sources; nobody else would while this thread waits
  lock();
}

// Threads that waited in the parent are a part of the old condition variable's state. It is leaked.
void RingMutex::after_fork_in_child() {
  static_cast<void>(changed_.release());
  changed_ = std::make_unique<std::condition_variable>();
  mutex_.unlock();
}

}  // namespace distorch
