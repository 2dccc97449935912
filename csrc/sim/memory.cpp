// SPDX-License-Identifier: Apache-2.0
#include "sim/memory.h"

#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

namespace distorch::sim {
namespace {

constexpr uint64_t kGranule = 512;  // of device memory
constexpr uint64_t kHostPage = 4096;
constexpr int kPoison = 0xff;  // NaN in every floating format

std::byte* reserve(uint64_t bytes, int protection) {
  void* at = ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(at);
}

struct Pinned {
  uint64_t bytes = 0;
  std::vector<MarkPtr> used = {};  // see keep_pinned_until()
};

struct Memories {
  std::mutex mutex;
  std::vector<std::weak_ptr<DeviceMemory>> all;        // old ones, too
  std::vector<std::shared_ptr<DeviceMemory>> present;  // by device
  std::map<std::byte*, Pinned> pinned;                 // by address
  uint64_t fail_in = 0;
  int fail_device = kHost;
};

Memories& memories() {
  static Memories& instance = *new Memories;
  return instance;
}

bool fails_now(int device) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  if (all.fail_in == 0 || (all.fail_device != kHost && all.fail_device != device)) return false;
  return --all.fail_in == 0;
}

}  // namespace

DeviceMemory::DeviceMemory(int device, uint64_t capacity)
    : device_(device),
      capacity_(capacity),
      base_(reserve(capacity, PROT_NONE)),
      shadow_(reserve(capacity, PROT_READ | PROT_WRITE)),
      arena_(capacity, kGranule) {}

DeviceMemory::~DeviceMemory() {
  Machine& machine = Machine::instance();
  machine.synchronize_all();  // what is queued has addresses in here
  const auto begin = reinterpret_cast<uintptr_t>(base_);
  machine.forget(begin, begin + capacity_);
  ::munmap(base_, capacity_);
  ::munmap(shadow_, capacity_);
}

std::byte* DeviceMemory::allocate(uint64_t bytes, int stream) {
  Machine& machine = Machine::instance();
  if (fails_now(device_)) return nullptr;
  std::lock_guard lock(mutex_);
  const uint64_t room = round_up_room(bytes, kGranule);
  if (arena_.used() + room > limit_) return nullptr;
  const auto offset = arena_.allocate(room);
  if (!offset) return nullptr;
  peak_ = std::max(peak_, arena_.used());
  const uint64_t end = *offset + room;
  auto range = freed_.upper_bound(*offset);
  if (range != freed_.begin() && std::prev(range)->second.end > *offset) --range;
  while (range != freed_.end() && range->first < end) {
    if (range->second.stream != stream) machine.wait(stream, range->second.mark);
    const Freed old = range->second;
    const uint64_t begin = range->first;
    range = freed_.erase(range);
    if (begin < *offset) freed_.emplace(begin, Freed{*offset, old.stream, old.mark});
    if (old.end > end) range = freed_.emplace(end, old).first;
  }
  return base_ + *offset;
}

void DeviceMemory::free(std::byte* address, uint64_t bytes, int stream) {
  Machine& machine = Machine::instance();
  const auto at = reinterpret_cast<uintptr_t>(address);
  Task task;
  task.label = "free";
  task.accesses = {{at, at + bytes, true}};
  const Mode mode = machine.config().mode;
  std::byte* bytes_at = real(address);
  if (mode == Mode::kDeferred) task.start = [bytes_at, bytes] { poison(bytes_at, bytes); };
  if (mode == Mode::kEager) poison(bytes_at, bytes);
  std::lock_guard lock(mutex_);
  machine.issue(stream, std::move(task), 0);
  const uint64_t offset = static_cast<uint64_t>(address - base_);
  const uint64_t room = round_up_room(bytes, kGranule);
  freed_.insert_or_assign(offset, Freed{offset + room, stream, machine.record(stream, 0)});
  arena_.free(offset, room);
}

uint64_t DeviceMemory::used() const {
  std::lock_guard lock(mutex_);
  return arena_.used();
}

uint64_t DeviceMemory::peak() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

void DeviceMemory::reset_peak() {
  std::lock_guard lock(mutex_);
  peak_ = arena_.used();
}

void DeviceMemory::set_limit(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  limit_ = bytes;
}

std::shared_ptr<DeviceMemory> device_memory(int device) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  const Config& config = Machine::instance().config();
  if (device < 0 || device >= config.devices) throw std::out_of_range("sim: no such device");
  all.present.resize(static_cast<size_t>(config.devices));
  auto& memory = all.present[static_cast<size_t>(device)];
  if (memory == nullptr) {
    memory = std::make_shared<DeviceMemory>(device, config.memory);
    std::erase_if(all.all, [](const auto& old) { return old.expired(); });
    all.all.push_back(memory);
  }
  return memory;
}

void renew_memories() {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  all.present.clear();
  all.fail_in = 0;
}

void poison(std::byte* real, uint64_t bytes) { std::memset(real, kPoison, bytes); }

std::byte* real_bytes(const void* address) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  for (const auto& weak : all.all) {
    if (const auto memory = weak.lock(); memory != nullptr && memory->owns(address)) {
      return memory->real(address);
    }
  }
  return static_cast<std::byte*>(const_cast<void*>(address));
}

std::byte* allocate_pinned(uint64_t bytes) {
  const uint64_t room = round_up_room(bytes, kHostPage);
  std::byte* at = reserve(room, PROT_READ | PROT_WRITE);
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  all.pinned.emplace(at, Pinned{room});
  return at;
}

void free_pinned(std::byte* address) {
  Memories& all = memories();
  Pinned gone;
  {
    std::lock_guard lock(all.mutex);
    gone = std::move(all.pinned.at(address));
    all.pinned.erase(address);
  }
  Machine& machine = Machine::instance();
  for (const MarkPtr& used : gone.used) machine.synchronize(used);
  const auto at = reinterpret_cast<uintptr_t>(address);
  const size_t known = machine.races().size();
  machine.host_access({at, at + gone.bytes, true}, "giving pinned memory back");
  // Told; and the copy that comes later must find some memory there.
  if (machine.races().size() > known) machine.synchronize_all();
  machine.forget(at, at + gone.bytes);
  ::munmap(address, gone.bytes);
}

bool is_pinned(const void* address) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  auto* at = static_cast<std::byte*>(const_cast<void*>(address));
  auto after = all.pinned.upper_bound(at);
  if (after == all.pinned.begin()) return false;
  const auto& [begin, pinned] = *std::prev(after);
  return at < begin + pinned.bytes;
}

uint64_t pinned_bytes() {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  uint64_t total = 0;
  for (const auto& [at, pinned] : all.pinned) total += pinned.bytes;
  return total;
}

void keep_pinned_until(const void* address, const MarkPtr& ended) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  const auto found = all.pinned.find(static_cast<std::byte*>(const_cast<void*>(address)));
  if (found == all.pinned.end()) return;
  std::vector<MarkPtr>& used = found->second.used;
  std::erase_if(used, [](const MarkPtr& mark) { return mark->done.load(); });
  used.push_back(ended);
}

void fail_allocation(uint64_t nth, int device) {
  Memories& all = memories();
  std::lock_guard lock(all.mutex);
  all.fail_in = nth;
  all.fail_device = device;
}

}  // namespace distorch::sim
