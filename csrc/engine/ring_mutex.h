// The mutex of a ring, and what its holders owe each other.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

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
class RingMutex {
 public:
  RingMutex() = default;
  RingMutex(const RingMutex&) = delete;
  RingMutex& operator=(const RingMutex&) = delete;

  // Holds the mutex as long as it lives.
  class Lock {
   public:
    explicit Lock(RingMutex& mutex) : mutex_(mutex) { lock(); }
    ~Lock() {
      if (held_.owns_lock()) unlock();
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

    void lock();
    void unlock();
    // Gives the mutex up until somebody calls notify(). May return earlier.
    void wait();

   private:
    RingMutex& mutex_;
    std::unique_lock<std::mutex> held_{mutex_.mutex_, std::defer_lock};
  };

  // Gives a lock up as long as this lives.
  class Unlocked {
   public:
    explicit Unlocked(Lock& held) : lock_(held) { lock_.unlock(); }
    ~Unlocked() { lock_.lock(); }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

   private:
    Lock& lock_;
  };

  // Ends after the mutex was given up. REQUIRES: the mutex is held.
  void let_go(Source source) { let_go_.push_back(std::move(source)); }
  // The state of a slot has changed: whoever waits looks again.
  void notify() { changed_->notify_all(); }

  // Around a fork of the process.
  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child();

 private:
  std::mutex mutex_;
  std::unique_ptr<std::condition_variable> changed_ = std::make_unique<std::condition_variable>();
  std::vector<Source> let_go_;  // guarded by mutex_
};

}  // namespace distorch
