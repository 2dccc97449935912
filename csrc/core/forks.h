// SPDX-License-Identifier: Apache-2.0
// Forks of this process, and why a child finds no mutex of ours held.
#pragma once

#include <atomic>
#include <cstdint>

namespace distorch::forks {

// Note [Forks]
// A forked child has one thread: a copy of the one that forked. A mutex that another thread held
// stays held there for ever, over members that were half changed. So a fork waits until no other
// thread holds a mutex of ours (core/mutex.h), and meanwhile no thread gets its first one. A thread
// that has one already may take more, or nobody would ever be done.
//
// Every thread counts the mutexes that it holds. Counting costs nothing but a store, because the
// rare side pays: before it looks at these counts, the thread that forks has the kernel run a
// memory barrier on all others (membarrier). Where the system has no such call, the stores are
// sequentially consistent, which is slower.
//
// os.fork() has the GIL meanwhile. So whoever holds a mutex of ours must not wait for the GIL, nor
// for a thread that has yet to get its first mutex: see Note [Waiting for threads]. A thread that
// holds one and forks (in a library that it calls, to run a program) waits for nobody. Its child
// must do no more than exec.
//
// A process must have one copy of this code. Of two, the first would stop threads that want a mutex
// of its own, and the second would then wait for these threads, if they hold a mutex of the other.
//
// Objects that have a mutex and live as long as the process are made when the library is loaded. If
// they were made at their first use, a thread could be in the middle of that during a fork, and the
// child would wait for it for ever.

struct alignas(64) Thread {  // a cache line of its own
  std::atomic<int> held{0};  // mutexes; changed by that thread alone
};

inline thread_local constinit Thread* this_thread = nullptr;  // null: it has held none yet
inline std::atomic<bool> under_way{false};
inline std::atomic<bool> has_membarrier{false};

// Makes `this_thread`.
Thread& join();
// Until no fork is under way. The thread holds nothing meanwhile.
void wait_to_enter(Thread& thread);

// Counts the first mutex of a thread. False: a fork is under way, and nothing was counted.
inline bool try_enter(Thread& thread) {
  if (has_membarrier.load(std::memory_order_relaxed)) {
    thread.held.store(1, std::memory_order_relaxed);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (!under_way.load(std::memory_order_relaxed)) return true;
  } else {
    thread.held.store(1, std::memory_order_seq_cst);
    if (!under_way.load(std::memory_order_seq_cst)) return true;
  }
  thread.held.store(0, std::memory_order_release);
  return false;
}

// Before this thread takes a mutex.
inline void enter() {
  Thread& thread = this_thread != nullptr ? *this_thread : join();
  const int held = thread.held.load(std::memory_order_relaxed);
  if (held > 0) {
    thread.held.store(held + 1, std::memory_order_relaxed);
  } else if (!try_enter(thread)) {
    wait_to_enter(thread);
  }
}

// After this thread has given one up.
inline void leave() {
  const int held = this_thread->held.load(std::memory_order_relaxed);
  this_thread->held.store(held - 1, std::memory_order_release);
}

// Of this thread.
inline int mutexes_held() {
  return this_thread == nullptr ? 0 : this_thread->held.load(std::memory_order_relaxed);
}

// Forks of this process since the first mutex was taken or this was asked; also those that failed.
uint64_t count();

// Has `then` called in every forked child, in the order of these calls, before anything else of
// ours runs there.
void in_child(void (*then)());

}  // namespace distorch::forks
