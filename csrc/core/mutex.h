// SPDX-License-Identifier: Apache-2.0
// Mutexes whose rules clang checks, and what waits with them.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "core/forks.h"

// Note [Which mutex guards what]
// The words below say which mutex guards a member, and which one a function wants its caller to
// hold. clang checks them (`make lint-locks`); other compilers see nothing. What they cannot say
// stays a comment: a slot of a ring, for one, does not know the ring whose mutex guards it.
#if defined(__clang__)
#define DISTORCH_LOCKS(word) __attribute__((word))
#else
#define DISTORCH_LOCKS(word)
#endif

// A class: its objects can be held, or hold another one as long as they live.
#define CAPABILITY(name) DISTORCH_LOCKS(capability(name))
#define SCOPED_CAPABILITY DISTORCH_LOCKS(scoped_lockable)
// A member: it, or what it points to, is used only while the mutex is held.
#define GUARDED_BY(mutex) DISTORCH_LOCKS(guarded_by(mutex))
#define PT_GUARDED_BY(mutex) DISTORCH_LOCKS(pt_guarded_by(mutex))
// A function: the caller holds the mutex; the function takes it, or gives it up; or it is called
// where the mutex is known to be held.
#define REQUIRES(...) DISTORCH_LOCKS(requires_capability(__VA_ARGS__))
#define ACQUIRE(...) DISTORCH_LOCKS(acquire_capability(__VA_ARGS__))
#define RELEASE(...) DISTORCH_LOCKS(release_capability(__VA_ARGS__))
#define ASSERT_HELD(...) DISTORCH_LOCKS(assert_capability(__VA_ARGS__))
// A function that clang cannot follow. A comment says why it is right.
#define NOT_FOLLOWED DISTORCH_LOCKS(no_thread_safety_analysis)

namespace distorch {

// Whether check_mutex_held() looks: the environment has DISTORCH_CHECK_LOCKS. Our tests do.
inline const bool checks_locks = std::getenv("DISTORCH_CHECK_LOCKS") != nullptr;

// Aborts where this thread holds a mutex of ours and must not (see Note [Waiting for threads]), or
// holds none and must.
inline void check_mutex_held(bool wanted) {
  if (!checks_locks || (forks::mutexes_held() > 0) == wanted) return;
  std::fputs(wanted ? "distorch: a thread lacks the mutex that it needs\n"
                    : "distorch: a thread that holds a mutex may wait for the GIL\n",
             stderr);
  std::abort();
}

// A forked child finds it free (Note [Forks]). The exception is a mutex with which threads wait:
// see Condition::wait().
class CAPABILITY("mutex") Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void lock() ACQUIRE() {
    forks::enter();
    mutex_.lock();
  }
  void unlock() RELEASE() {
    mutex_.unlock();
    forks::leave();
  }
  // In a forked child, for a mutex with a Condition: nobody holds it there.
  void start_afresh() { std::construct_at(&mutex_); }

 private:
  friend class Condition;
  std::mutex mutex_;
};

// Holds a mutex as long as it lives.
class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() RELEASE() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// Threads sleep here until another one says that something has changed.
class Condition {
 public:
  // Gives the mutex up meanwhile. May return earlier: the caller looks again.
  // A fork does not wait for threads that sleep here. One that falls asleep or wakes up at that
  // moment has the mutex without being counted. It changes nothing meanwhile, so all that a child
  // has to do is Mutex::start_afresh().
  // REQUIRES: this thread holds no other mutex.
  void wait(Mutex& mutex) REQUIRES(mutex) {
    std::unique_lock held(mutex.mutex_, std::adopt_lock);
    forks::leave();
    changed_.wait(held);
    if (!forks::try_enter(*forks::this_thread)) {  // nothing may change before the fork is over
      held.unlock();
      forks::enter();
      held.lock();
    }
    held.release();  // the caller goes on holding it
  }
  void notify_one() { changed_.notify_one(); }
  void notify_all() { changed_.notify_all(); }

 private:
  std::condition_variable changed_;
};

}  // namespace distorch
