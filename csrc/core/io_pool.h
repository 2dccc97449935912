// SPDX-License-Identifier: Apache-2.0
// Threads that do blocking host-side work (file reads), in the order needed.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/executor.h"
#include "core/mutex.h"

namespace distorch {

// Note [Calm and hurry]
// Reads take little CPU, but each one that ends wakes a thread, and with all
// cores computing every wake-up costs the computation. So while nobody waits
// for a read, kCalmThreads of them keep the queue going; as soon as somebody
// does (hurry(), or a task that is submitted as kNow), all threads take part,
// for kHurryTasks tasks.
class IoPool : public Executor {
 public:
  // Threads start with the first task.
  explicit IoPool(size_t threads) : wanted_threads_(threads) {}
  // Drops what is queued, waits for what is running.
  ~IoPool() override;
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;

  // Throws std::system_error where not a single thread can be started.
  void submit(std::vector<Task> tasks, Urgency urgency) override;
  // All threads are to work for a while.
  void hurry() override;
  // Threads do not survive a fork.
  void start_afresh() override;

 private:
  struct Crew {
    Mutex mutex;
    Condition wake;
    std::deque<Task> queue GUARDED_BY(mutex);
    size_t busy GUARDED_BY(mutex) = 0;     // threads with a task
    size_t hurried GUARDED_BY(mutex) = 0;  // tasks still to hurry for
    bool closing GUARDED_BY(mutex) = false;
    std::vector<std::thread> threads GUARDED_BY(mutex);  // until closing
  };

  static constexpr size_t kCalmThreads = 2;
  static constexpr size_t kHurryTasks = 256;

  static void start_threads(Crew& crew, size_t wanted) REQUIRES(crew.mutex);
  static bool may_start(const Crew& crew) REQUIRES(crew.mutex);
  static void work(Crew& crew);
  static void run_first(Crew& crew) REQUIRES(crew.mutex);

  const size_t wanted_threads_;
  std::unique_ptr<Crew> crew_ = std::make_unique<Crew>();
};

}  // namespace distorch
