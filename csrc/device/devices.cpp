// SPDX-License-Identifier: Apache-2.0
#include "device/devices.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "core/forks.h"
#include "core/io_pool.h"
#include "core/mutex.h"
#include "core/virtual_reads.h"
#include "device/accelerator.h"
#include "device/host_device.h"
#include "device/threads.h"
#include "engine/waiting.h"

namespace distorch {
namespace {

struct Registry {
  Mutex mutex;
  std::map<std::string, std::weak_ptr<Ring>> rings GUARDED_BY(mutex);
  size_t io_threads GUARDED_BY(mutex) = 6;
};

// Never destroyed: weights may outlive every static object.
Registry& registry = *new Registry;

void start_afresh_in_child() {
  compute_threads_are_gone();
  std::vector<std::shared_ptr<Ring>> rings;
  {
    const MutexLock lock(registry.mutex);
    for (const auto& [device, known] : registry.rings) rings.push_back(known.lock());
  }
  for (const auto& ring : rings) {
    if (ring != nullptr) ring->start_afresh();
  }
}

[[maybe_unused]] const bool told_of_forks = (forks::in_child(&start_afresh_in_child), true);

// Its threads end with it. See Note [Waiting for threads].
void end_ring(Ring* ring) {
  waiting([ring] { delete ring; });
}

}  // namespace

std::shared_ptr<Ring> ring_for(const std::string& device) {
  const MutexLock lock(registry.mutex);
  std::weak_ptr<Ring>& known = registry.rings[device];
  if (auto ring = known.lock()) return ring;
  const c10::Device where(device);
  std::unique_ptr<Transfer> transfer;
  if (where.is_cpu()) {
    transfer = std::make_unique<HostDevice>();
  } else {
    transfer = std::make_unique<Accelerator>(where);
  }
  std::unique_ptr<Executor> readers;
  if (ReadClock* clock = read_clock(c10::DeviceTypeName(where.type(), true))) {
    readers = std::make_unique<VirtualReads>(*clock);
  } else {
    readers = std::make_unique<IoPool>(registry.io_threads);
  }
  const std::shared_ptr<Ring> ring(new Ring(std::move(transfer), std::move(readers)), &end_ring);
  known = ring;
  return ring;
}

Reservation::Reservation(const std::string& device, uint64_t bytes)
    : ring_(ring_for(device)), ticket_(ring_->reserve(bytes)) {}

Reservation::~Reservation() {
  waiting([this] { ring_->release(ticket_); });
}

uint64_t reserved_beside(const std::string& device, const Reservation* own) {
  const std::shared_ptr<Ring> ring = ring_for(device);
  return ring->reserved_beside(own != nullptr && own->ring_ == ring ? own->ticket_ : 0);
}

void set_io_threads(size_t threads) {
  const MutexLock lock(registry.mutex);
  registry.io_threads = std::max<size_t>(threads, 1);
}

}  // namespace distorch
