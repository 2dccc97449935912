#include "device/devices.h"

#include <pthread.h>
#include <sys/mman.h>

#include <map>
#include <new>
#include <vector>

#include "core/decode.h"
#include "core/host_memory.h"
#include "core/virtual_reads.h"
#include "device/accelerator.h"
#include "device/storages.h"
#include "device/threads.h"
#include "engine/waiting.h"

namespace distorch {
namespace {

// Pages of the system's own, exact in size and gone when given back.
class HostDevice : public RingDevice {
 public:
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override {
    void* memory =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    prefer_huge_pages(memory, bytes);
    return {static_cast<std::byte*>(memory), [bytes](std::byte* at) { ::munmap(at, bytes); }};
  }

  std::shared_ptr<void> wrap(Slot&, std::byte* data, uint64_t bytes,
                             std::shared_ptr<void> block) override {
    return slot_storage(data, bytes, std::move(block), c10::Device(c10::kCPU));
  }

  bool in_use(const std::shared_ptr<void>& wrapped) const override { return slot_in_use(wrapped); }

  void decode(const Decoder& decoder, const std::byte* encoded, std::byte* into) override {
    const auto rows = static_cast<int64_t>(decoder.rows());
    const int64_t step = decoder.in_place() ? kTileRows : kPanelRows;
    const int64_t each = rows_per_part(rows, static_cast<int64_t>(decoder.decoded_row()), step,
                                       static_cast<int64_t>(compute_threads()));
    for_parts_on_compute_threads(divide_up(rows, each), [&](uint64_t part) {
      const uint64_t begin = part * each, end = std::min<uint64_t>(begin + each, rows);
      decoder.decode(begin, end, encoded + begin * decoder.stored_row(),
                     into + begin * decoder.decoded_row());
    });
  }
};

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
  const auto rings = std::move(held());  // the last holder of one may be here
  held().clear();
  registry().mutex.unlock();
}

void let_go_in_child() {
  compute_threads_are_gone();
  for (auto& ring : held()) ring->after_fork_in_child();
  const auto rings = std::move(held());
  held().clear();
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
  std::unique_ptr<RingDevice> memory = std::make_unique<HostDevice>();
  if (!where.is_cpu()) memory = std::make_unique<Accelerator>(where);
  std::unique_ptr<Executor> readers = std::make_unique<IoPool>(all.io_threads);
  if (const ReadClock* clock = read_clock(c10::DeviceTypeName(where.type(), true))) {
    readers = std::make_unique<VirtualReads>(*clock);
  }
  const std::shared_ptr<Ring> ring(new Ring(std::move(memory), std::move(readers)), &end_ring);
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
