// SPDX-License-Identifier: Apache-2.0
#include "core/io_pool.h"

#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <system_error>
#include <utility>

#include "core/mutex.h"

namespace distorch {

IoPool::~IoPool() {
  {
    const MutexLock lock(crew_->mutex);
    crew_->closing = true;
    crew_->queue.clear();
  }
  crew_->wake.notify_all();
  for (std::thread& thread : crew_->threads) thread.join();  // nobody changes them any more
}

void IoPool::submit(std::vector<Task> tasks, Urgency urgency) {
  Crew& crew = *crew_;
  bool all = false;
  {
    const MutexLock lock(crew.mutex);
    start_threads(crew, std::min(wanted_threads_, crew.queue.size() + tasks.size()));
    const auto where = urgency == Urgency::kNow ? crew.queue.begin() : crew.queue.end();
    crew.queue.insert(where, std::make_move_iterator(tasks.begin()),
                      std::make_move_iterator(tasks.end()));
    if (urgency == Urgency::kNow) crew.hurried = kHurryTasks;
    if (!may_start(crew)) return;
    all = crew.hurried > 0;
  }
  if (all) {
    crew.wake.notify_all();
  } else {
    crew.wake.notify_one();
  }
}

// Goes on with fewer where the system has no more of them, but not with none.
void IoPool::start_threads(Crew& crew, size_t wanted) {
  try {
    while (crew.threads.size() < wanted) crew.threads.emplace_back([&crew] { work(crew); });
  } catch (const std::system_error&) {
    if (crew.threads.empty()) throw;
  }
}

void IoPool::hurry() {
  Crew& crew = *crew_;
  {
    const MutexLock lock(crew.mutex);
    const bool hurrying = crew.hurried > 0;
    crew.hurried = kHurryTasks;
    if (hurrying) return;
  }
  crew.wake.notify_all();
}

// The old crew is leaked: its threads can be neither joined nor destroyed, and
// its mutex may have been held by one of them.
void IoPool::start_afresh() {
  static_cast<void>(crew_.release());
  crew_ = std::make_unique<Crew>();
}

bool IoPool::may_start(const Crew& crew) {
  return !crew.queue.empty() && (crew.hurried > 0 || crew.busy < kCalmThreads);
}

void IoPool::work(Crew& crew) {
  pthread_setname_np(pthread_self(), "distorch-io");
  const MutexLock lock(crew.mutex);
  for (;;) {
    while (!crew.closing && !may_start(crew)) crew.wake.wait(crew.mutex);
    if (crew.queue.empty()) return;
    run_first(crew);
  }
}

// The mutex is given up while the task runs.
void IoPool::run_first(Crew& crew) {
  Task task = std::move(crew.queue.front());
  crew.queue.pop_front();
  if (crew.hurried > 0) --crew.hurried;
  ++crew.busy;
  const bool more = may_start(crew);
  crew.mutex.unlock();
  if (more) crew.wake.notify_one();  // one more thread may join in; it wakes the next
  task.run();
  task.run = nullptr;
  crew.mutex.lock();
  --crew.busy;
}

}  // namespace distorch
