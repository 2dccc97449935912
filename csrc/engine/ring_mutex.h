// SPDX-License-Identifier: Apache-2.0
// The mutex of a ring, and what its holders owe each other.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "core/mutex.h"
#include "engine/source.h"

namespace distorch {

// One mutex guards a ring: its slots, its cache, its forecast, and what its device has been asked
// for. Threads of Python take it for every fetch, and reader threads for every read that ends. So
// nobody waits for another thread while holding it, but in wait() below.
//
// A slot may be the last holder of a donor or a decoder, and these may hold the last tensor over
// some memory that Python knows. The end of such a tensor waits for the GIL, and whoever has the
// GIL may be waiting for this mutex. So whoever lets go of a slot adds the slot's source to
// let_go(). Sources in that list end after the mutex was given up: see Note [Waiting for threads].
class CAPABILITY("mutex") RingMutex : Mutex {
 public:
  RingMutex() = default;
  RingMutex(const RingMutex&) = delete;
  RingMutex& operator=(const RingMutex&) = delete;

  class Unlocked;

  // Holds the mutex as long as it lives.
  class SCOPED_CAPABILITY Lock {
   public:
    explicit Lock(RingMutex& mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
    ~Lock() RELEASE() { mutex_.unlock(); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    friend class Unlocked;
    RingMutex& mutex_;
  };

  // Gives a lock up as long as this lives. clang is not told, and believes that the mutex is held:
  // code in between uses what no other thread changes, such as a slot that it has made kLoading.
  class Unlocked {
   public:
    explicit Unlocked(Lock& held) : mutex_(held.mutex_) { mutex_.unlock(); }
    ~Unlocked() { mutex_.lock(); }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

   private:
    RingMutex& mutex_;
  };

  // For functions of which clang does not know that their caller holds this mutex.
  void assert_held() const ASSERT_HELD(this) { check_mutex_held(true); }
  // Ends after the mutex was given up. Destructors call this, so it does not throw.
  void let_go(Source source) noexcept REQUIRES(this);
  // Gives the mutex up until somebody calls notify(). May return earlier.
  void wait() REQUIRES(this);
  // The state of a slot has changed: whoever waits looks again.
  void notify() { changed_->notify_all(); }

  // In a forked child. Threads that waited in the parent are not there any more.
  void start_afresh();

 private:
  void unlock() RELEASE();

  std::unique_ptr<Condition> changed_ = std::make_unique<Condition>();
  std::vector<Source> let_go_ GUARDED_BY(this);
};

}  // namespace distorch
