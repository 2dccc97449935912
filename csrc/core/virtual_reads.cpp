// SPDX-License-Identifier: Apache-2.0
#include "core/virtual_reads.h"

#include <iterator>
#include <map>
#include <utility>

#include "core/mutex.h"

namespace distorch {
namespace {

struct Clocks {
  Mutex mutex;
  std::map<std::string, ReadClock*> known GUARDED_BY(mutex);
};

Clocks& clocks = *new Clocks;

}  // namespace

void VirtualReads::submit(std::vector<Task> tasks, Urgency urgency) {
  const bool urgent = urgency == Urgency::kNow;
  std::deque<Read> issued;
  for (Task& task : tasks) {
    void* ticket = clock_.begin(task.bytes, urgent);
    issued.push_back({{ticket, Forget{&clock_}}, std::move(task)});
  }
  const MutexLock lock(mutex_);
  reads_.insert(urgent ? reads_.begin() : reads_.end(), std::make_move_iterator(issued.begin()),
                std::make_move_iterator(issued.end()));
}

void VirtualReads::start_afresh() {
  const MutexLock lock(mutex_);
  reads_.clear();
}

std::optional<VirtualReads::Read> VirtualReads::take_first(bool ended) {
  const MutexLock lock(mutex_);
  if (reads_.empty() || (ended && !clock_.ended(reads_.front().ticket.get()))) return std::nullopt;
  std::optional<Read> first(std::move(reads_.front()));
  reads_.pop_front();
  return first;
}

void VirtualReads::catch_up() {
  while (auto read = take_first(true)) read->task.run();
}

bool VirtualReads::run_next() {
  const auto read = take_first(false);
  if (!read) return false;
  clock_.wait(read->ticket.get());
  read->task.run();
  return true;
}

void set_read_clock(const std::string& device_type, ReadClock* clock) {
  const MutexLock lock(clocks.mutex);
  clocks.known[device_type] = clock;
}

ReadClock* read_clock(const std::string& device_type) {
  const MutexLock lock(clocks.mutex);
  const auto found = clocks.known.find(device_type);
  return found == clocks.known.end() ? nullptr : found->second;
}

}  // namespace distorch
