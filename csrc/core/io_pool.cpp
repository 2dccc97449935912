#include "core/io_pool.h"

#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace distorch {

IoPool::~IoPool() {
  {
    std::lock_guard lock(crew_->mutex);
    crew_->closing = true;
    crew_->queue.clear();
  }
  crew_->wake.notify_all();
  for (std::thread& thread : crew_->threads) thread.join();
}

void IoPool::submit(std::vector<Task> tasks, Urgency urgency) {
  Crew& crew = *crew_;
  {
    std::lock_guard lock(crew.mutex);
    const auto where = urgency == Urgency::kNow ? crew.queue.begin() : crew.queue.end();
    crew.queue.insert(where, std::make_move_iterator(tasks.begin()),
                      std::make_move_iterator(tasks.end()));
    while (crew.threads.size() < std::min(wanted_threads_, crew.queue.size())) {
      crew.threads.emplace_back([&crew] { work(crew); });
    }
  }
  crew.wake.notify_all();
}

// The old crew is leaked: its threads can be neither joined nor destroyed, and
// its mutex may have been held by one of them.
void IoPool::start_afresh() {
  static_cast<void>(crew_.release());
  crew_ = std::make_unique<Crew>();
}

void IoPool::work(Crew& crew) {
  pthread_setname_np(pthread_self(), "distorch-io");
  for (;;) {
    Task task;
    {
      std::unique_lock lock(crew.mutex);
      crew.wake.wait(lock, [&] { return crew.closing || !crew.queue.empty(); });
      if (crew.queue.empty()) return;
      task = std::move(crew.queue.front());
      crew.queue.pop_front();
    }
    task();
  }
}

}  // namespace distorch
