// SPDX-License-Identifier: Apache-2.0
#include "core/forks.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace distorch::forks {
namespace {

bool membarrier(int command) {
#if defined(__linux__)
  return ::syscall(__NR_membarrier, command, 0, 0) == 0;
#else
  static_cast<void>(command);
  return false;
#endif
}

#if defined(__linux__)
constexpr int kRegister = MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED;
constexpr int kBarrier = MEMBARRIER_CMD_PRIVATE_EXPEDITED;
#else
constexpr int kRegister = 0, kBarrier = 0;
#endif

void before();
void after_in_parent();
void after_in_child();

struct Process {
  Process() {
    has_membarrier = membarrier(kRegister);
    ::pthread_atfork(&before, &after_in_parent, &after_in_child);
  }
  // Guards the members below, and is held during a fork: one at a time.
  std::mutex mutex;
  std::vector<Thread*> threads;
  std::vector<void (*)()> in_child;
  std::atomic<uint64_t> count{0};
};

// Never destroyed: threads may end after every static object.
Process& process() {
  static Process& instance = *new Process;
  return instance;
}

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

// Whether before() waited for nobody, because this thread holds a mutex itself.
thread_local bool passed = false;

void before() {
  passed = mutexes_held() > 0;
  if (passed) return;
  process().mutex.lock();
  under_way.store(true, std::memory_order_seq_cst);
  // A system that takes the call away later (a filter of system calls) leaves time to do its work.
  if (has_membarrier && !membarrier(kBarrier)) nap();
  for (const Thread* thread : process().threads) {
    while (thread != this_thread && thread->held.load(std::memory_order_seq_cst) > 0) nap();
  }
}

void after_in_parent() {
  ++process().count;
  if (passed) return;
  under_way.store(false, std::memory_order_seq_cst);
  process().mutex.unlock();
}

// Only this thread is left, so the counts of others must not be waited for at the next fork.
void after_in_child() {
  if (passed) return;
  std::vector<Thread*>& threads = process().threads;
  std::erase_if(threads, [](const Thread* thread) { return thread != this_thread; });
  has_membarrier = membarrier(kRegister);
  under_way.store(false, std::memory_order_seq_cst);
  const std::vector<void (*)()> calls = process().in_child;
  process().mutex.unlock();
  for (const auto call : calls) call();
}

void enlist(Thread* thread) {
  const std::lock_guard lock(process().mutex);
  process().threads.push_back(thread);
}

// Takes a thread off the list when it ends.
struct Membership {
  Membership() { enlist(this_thread); }
  ~Membership() {
    const std::lock_guard lock(process().mutex);
    std::erase(process().threads, this_thread);
    delete std::exchange(this_thread, nullptr);
  }
};

}  // namespace

Thread& join() {
  thread_local bool is_member = false;
  this_thread = new Thread;
  if (std::exchange(is_member, true)) {
    // The thread is ending, and its membership has ended already. It stays on the list.
    enlist(this_thread);
  } else {
    thread_local const Membership membership;
  }
  return *this_thread;
}

void wait_to_enter(Thread& thread) {
  do {
    while (under_way.load(std::memory_order_seq_cst)) nap();
  } while (!try_enter(thread));
}

uint64_t count() { return process().count; }

void in_child(void (*then)()) {
  const std::lock_guard lock(process().mutex);
  process().in_child.push_back(then);
}

}  // namespace distorch::forks
