// Threads that do blocking host-side work (file reads), in the order needed.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace distorch {

class IoPool {
 public:
  using Task = std::function<void()>;
  enum class Urgency { kNow, kAhead };

  // Threads start with the first task.
  explicit IoPool(size_t threads) : wanted_threads_(threads) {}
  // Drops what is queued, waits for what is running.
  ~IoPool();
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;

  // Tasks must not throw. kNow goes before everything that is not yet running;
  // tasks of one call keep their order.
  void submit(std::vector<Task> tasks, Urgency urgency);

 private:
  void run();
  void start_threads();

  const size_t wanted_threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> queue_;            // guarded by mutex_
  int process_ = 0;                   // whose threads they are; guarded by mutex_
  bool closing_ = false;              // guarded by mutex_
  std::vector<std::thread> threads_;  // guarded by mutex_ until closing
};

}  // namespace distorch
