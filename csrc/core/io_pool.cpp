#include "core/io_pool.h"

#include <unistd.h>

#include <iterator>
#include <utility>

namespace distorch {

IoPool::~IoPool() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
    queue_.clear();
    if (process_ != getpid()) threads_.swap(*new std::vector<std::thread>);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void IoPool::submit(std::vector<Task> tasks, Urgency urgency) {
  {
    std::lock_guard lock(mutex_);
    const auto where = urgency == Urgency::kNow ? queue_.begin() : queue_.end();
    queue_.insert(where, std::make_move_iterator(tasks.begin()),
                  std::make_move_iterator(tasks.end()));
    start_threads();
  }
  wake_.notify_all();
}

// A forked child has the thread objects of its parent but not the threads:
// they are forgotten, since they can be neither joined nor destroyed.
void IoPool::start_threads() {
  if (process_ != getpid()) {
    threads_.swap(*new std::vector<std::thread>);
    process_ = getpid();
  }
  while (threads_.size() < wanted_threads_ && threads_.size() < queue_.size()) {
    threads_.emplace_back([this] { run(); });
  }
}

void IoPool::run() {
  for (;;) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    task();
  }
}

}  // namespace distorch
