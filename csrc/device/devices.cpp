#include "device/devices.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/io_pool.h"
#include "core/virtual_reads.h"
#include "device/accelerator.h"
#include "device/host_device.h"
#include "device/threads.h"
#include "engine/waiting.h"

namespace distorch {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<Ring>> rings;  // guarded by mutex
  std::string scratch = "/tmp";                      // guarded by mutex
  size_t io_threads = 6;                             // guarded by mutex
};

void hold_for_fork();
void let_go_in_parent();
void let_go_in_child();

// Never destroyed: weights may outlive every static object.
Registry& registry() {
  static Registry& instance = []() -> Registry& {
    ::pthread_atfork(&hold_for_fork, &let_go_in_parent, &let_go_in_child);
    return *new Registry;
  }();
  return instance;
}

// The rings that hold_for_fork() locked. The registry stays locked in between.
std::vector<std::shared_ptr<Ring>>& held() {
  static auto& rings = *new std::vector<std::shared_ptr<Ring>>;
  return rings;
}

void hold_for_fork() {
  registry().mutex.lock();
  for (auto& [device, known] : registry().rings) {
    if (auto ring = known.lock()) held().push_back(std::move(ring));
  }
  for (auto& ring : held()) ring->before_fork();
}

void let_go_in_parent() {
  for (auto& ring : held()) ring->after_fork_in_parent();
  const auto rings = std::exchange(held(), {});  // the last holder of one may be here
  registry().mutex.unlock();
}

void let_go_in_child() {
  compute_threads_are_gone();
  for (auto& ring : held()) ring->after_fork_in_child();
  const auto rings = std::exchange(held(), {});
  registry().mutex.unlock();
}

// Its threads end with it. See Note [Waiting for threads].
void end_ring(Ring* ring) {
  waiting([ring] { delete ring; });
}

}  // namespace

std::shared_ptr<Ring> ring_for(const std::string& device) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  std::weak_ptr<Ring>& known = all.rings[device];
  if (auto ring = known.lock()) return ring;
  const c10::Device where(device);
  std::unique_ptr<Transfer> transfer;
  if (where.is_cpu()) {
    transfer = std::make_unique<HostDevice>();
  } else {
    transfer = std::make_unique<Accelerator>(where);
  }
  std::unique_ptr<Executor> readers;
  if (const ReadClock* clock = read_clock(c10::DeviceTypeName(where.type(), true))) {
    readers = std::make_unique<VirtualReads>(*clock);
  } else {
    readers = std::make_unique<IoPool>(all.io_threads);
  }
  const std::shared_ptr<Ring> ring(new Ring(std::move(transfer), std::move(readers)), &end_ring);
  known = ring;
  return ring;
}

Reservation::Reservation(const std::string& device, uint64_t bytes)
    : ring_(ring_for(device)), ticket_(ring_->reserve(bytes)) {}

Reservation::~Reservation() { ring_->release(ticket_); }

void set_scratch_directory(std::string directory) {
  std::lock_guard lock(registry().mutex);
  registry().scratch = std::move(directory);
}

std::string scratch_directory() {
  std::lock_guard lock(registry().mutex);
  return registry().scratch;
}

void set_io_threads(size_t threads) {
  std::lock_guard lock(registry().mutex);
  registry().io_threads = std::max<size_t>(threads, 1);
}

}  // namespace distorch
