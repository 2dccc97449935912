// SPDX-License-Identifier: Apache-2.0
// Forks while other threads hold mutexes, wait with them, begin and end.
#include "core/forks.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "core/mutex.h"
#include "tests/check.h"

using namespace distorch;

namespace {

// Two numbers that are equal whenever nobody holds the mutex.
struct Pair {
  Mutex mutex;
  uint64_t first GUARDED_BY(mutex) = 0;
  uint64_t second GUARDED_BY(mutex) = 0;

  void add() REQUIRES(mutex) {
    ++first;
    for (int i = 0; i < 50; ++i) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    ++second;
  }
  bool is_whole() {
    const MutexLock lock(mutex);
    return first == second;
  }
};

Pair outer, inner;

// A mutex that threads wait with.
struct Bell {
  Mutex mutex;
  Condition rung;
  uint64_t turns GUARDED_BY(mutex) = 0;
  uint64_t seen GUARDED_BY(mutex) = 0;  // == turns, but while a thread is between the two
  bool over GUARDED_BY(mutex) = false;
} bell;

void take_both(const std::atomic<bool>& stop) {
  while (!stop) {
    const MutexLock lock(outer.mutex);
    const MutexLock second(inner.mutex);
    outer.add();
    inner.add();
  }
}

void begin_and_end(const std::atomic<bool>& stop) {
  while (!stop) {
    std::thread([] {
      const MutexLock lock(inner.mutex);
      inner.add();
    }).join();
  }
}

void listen() {
  const MutexLock lock(bell.mutex);
  while (!bell.over) {
    bell.rung.wait(bell.mutex);
    ++bell.turns;
    for (int i = 0; i < 50; ++i) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    ++bell.seen;
  }
}

void ring(const std::atomic<bool>& stop) {
  while (!stop) {
    const MutexLock lock(bell.mutex);
    bell.rung.notify_all();
  }
}

bool in_child_was_called = false;

// Everything can be taken, and nothing was half done. 0: yes.
int look_in_child() {
  alarm(20);  // a mutex that stays held would hang here
  if (!in_child_was_called) return 1;
  if (!outer.is_whole() || !inner.is_whole()) return 2;
  bell.mutex.start_afresh();
  {
    const MutexLock lock(bell.mutex);
    if (bell.turns != bell.seen) return 3;
  }
  // A grandchild: counts of threads that are gone must not be waited for.
  const pid_t grandchild = fork();
  if (grandchild == 0) _exit(outer.is_whole() ? 0 : 1);
  int status = 0;
  waitpid(grandchild, &status, 0);
  return status == 0 ? 0 : 4;
}

void test_children_find_nothing_held() {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back([&] { take_both(stop); });
  threads.emplace_back([&] { begin_and_end(stop); });
  threads.emplace_back([&] { ring(stop); });
  std::vector<std::thread> listeners;
  for (int i = 0; i < 2; ++i) listeners.emplace_back(&listen);
  const uint64_t before = forks::count();
  constexpr int kForks = 150;
  for (int i = 0; i < kForks; ++i) {
    const pid_t child = fork();
    if (child == 0) _exit(look_in_child());
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(status == 0);
  }
  CHECK(forks::count() == before + kForks);
  stop = true;
  for (std::thread& thread : threads) thread.join();
  {
    const MutexLock lock(bell.mutex);
    bell.over = true;
    bell.rung.notify_all();
  }
  for (std::thread& thread : listeners) thread.join();
  CHECK(outer.is_whole() && inner.is_whole());
}

}  // namespace

int main() {
  forks::in_child([] { in_child_was_called = true; });
  test_children_find_nothing_held();
  return 0;
}
