// SPDX-License-Identifier: Apache-2.0
#include "sim/device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstring>
#include <map>
#include <unordered_map>

#include "sim/call.h"
#include "sim/memory.h"

namespace distorch::sim {
namespace {

// Streams that were asked for, used again after the next configure().
struct Pool {
  std::mutex mutex;
  std::unordered_map<int, std::vector<int>> streams;  // by device
  std::unordered_map<int, size_t> taken;
};

Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

// Streams whose work is being captured, and whether somebody has recorded an event there. That
// breaks the capture, as on CUDA: the caller gets an error, and so does whoever ends the capture.
struct Captures {
  std::mutex mutex;
  std::map<int, bool> broken;  // by stream; guarded by mutex
};

Captures& captures() {
  static Captures& instance = *new Captures;
  return instance;
}

bool is_captured(int stream) {
  std::lock_guard lock(captures().mutex);
  return captures().broken.count(stream) > 0;
}

// False: nobody captures there.
bool break_capture(int stream) {
  std::lock_guard lock(captures().mutex);
  const auto found = captures().broken.find(stream);
  if (found == captures().broken.end()) return false;
  return found->second = true;
}

std::atomic<uint64_t> events_recorded{0}, events_waited{0};

// Streams of PyTorch: id 0 is a device's default, id n + 1 the machine's n-th.
struct Defaults {
  std::mutex mutex;
  std::unordered_map<int, int> streams;  // device -> machine's stream
};

int default_stream(int device) {
  static Defaults& defaults = *new Defaults;
  std::lock_guard lock(defaults.mutex);
  const auto found = defaults.streams.find(device);
  if (found != defaults.streams.end()) return found->second;
  const int made = machine().new_stream("sim:" + std::to_string(device));
  defaults.streams.emplace(device, made);
  return made;
}

thread_local c10::DeviceIndex current_device = 0;
thread_local std::unordered_map<int, c10::StreamId> current_streams;

c10::Stream stream_now(c10::DeviceIndex device) {
  if (device < 0) device = current_device;
  const auto found = current_streams.find(device);
  const c10::StreamId id = found == current_streams.end() ? 0 : found->second;
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSim, device), id);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device old = getDevice();
    setDevice(device);
    return old;
  }
  c10::Device getDevice() const override { return {kSim, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < deviceCount(), "sim: there is no device ", device);
    if (device.index() >= 0) current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return stream_now(device.index()); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    if (device.index() < 0) device = getDevice();
    std::lock_guard lock(pool().mutex);
    std::vector<int>& known = pool().streams[device.index()];
    const size_t next = pool().taken[device.index()]++;
    if (next >= known.size()) known.push_back(machine().new_stream(device.str() + " extra"));
    return c10::Stream(c10::Stream::UNSAFE, device, known[next] + 1);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream old = stream_now(stream.device_index());
    current_streams[stream.device_index()] = stream.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(static_cast<intptr_t>(machine_stream(stream)));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<MarkPtr*>(event);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    check_alive(stream.device_index());
    TORCH_CHECK(!break_capture(machine_stream(stream)), "sim: an event was recorded on ", stream,
                ", where a graph is being captured: that breaks the capture");
    ++events_recorded;
    if (*event == nullptr) *event = new MarkPtr;
    *static_cast<MarkPtr*>(*event) = machine().record(machine_stream(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    ++events_waited;
    if (event != nullptr) machine().wait(machine_stream(stream), *static_cast<MarkPtr*>(event));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || machine().query(*static_cast<MarkPtr*>(event));
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(machine().config().devices);
  }
  bool queryStream(const c10::Stream& stream) const override {
    return machine().query_stream(machine_stream(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    machine().synchronize_stream(machine_stream(stream));
  }
  // Not `override`: PyTorch asks since 2.13.
  bool isStreamCapturing(const c10::Stream& stream) const {
    check_alive(stream.device_index());
    return is_captured(machine_stream(stream));
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) machine().synchronize(*static_cast<MarkPtr*>(event));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override { machine().synchronize_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override;
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    const Mark& start = **static_cast<MarkPtr*>(from);
    const Mark& end = **static_cast<MarkPtr*>(to);
    return start.epoch == end.epoch ? 1e3 * (end.time - start.time) : 0;  // the clock began anew
  }
};

struct Block {
  std::shared_ptr<DeviceMemory> memory;
  std::byte* address;
  uint64_t bytes;
  int stream;
  std::vector<int> others;  // streams that use it, too
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  for (const int other : block->others) {
    machine().wait(block->stream, machine().record(other, 0));
  }
  block->memory->free(block->address, block->bytes, block->stream);
  delete block;
}

void Guard::recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const {
  if (data.get_deleter() != &free_block) return;
  auto* block = static_cast<Block*>(data.get_context());
  const int id = machine_stream(stream);
  const auto& others = block->others;
  const bool known = std::find(others.begin(), others.end(), id) != others.end();
  if (id != block->stream && !known) block->others.push_back(id);
}

using Stats = c10::CachingDeviceAllocator::DeviceStats;

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kSim, current_device);
    if (bytes == 0) return {nullptr, nullptr, &free_block_or_nothing, device};
    check_alive(device.index());
    auto memory = device_memory(device.index());
    const int stream = current_stream(device.index());
    std::byte* address = memory->allocate(bytes, stream);
    TORCH_CHECK_WITH(OutOfMemoryError, address != nullptr, "sim: out of memory on ", device,
                     ": tried to allocate ", bytes, " bytes, ", memory->used(), " of ",
                     memory->capacity(), " are in use");
    return {address, new Block{std::move(memory), address, bytes, stream, {}}, &free_block, device};
  }
  static void free_block_or_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(real_bytes(to), real_bytes(from), bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Guard().recordDataPtrOnStream(data, stream);
  }
  Stats getDeviceStats(c10::DeviceIndex device) override {
    const MemoryNumbers numbers = memory_numbers(device);
    Stats stats;
    for (auto* array : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*array)[0].current = static_cast<int64_t>(numbers.used);
      (*array)[0].peak = static_cast<int64_t>(numbers.peak);
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { reset_peak(device); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const MemoryNumbers numbers = memory_numbers(device);
    return {numbers.capacity - numbers.used, numbers.capacity};
  }
};

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    std::byte* at = allocate_pinned(bytes);
    return {at, at, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* address) {
    if (address != nullptr) free_pinned(static_cast<std::byte*>(address));
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator& pinned_allocator() {
  static PinnedAllocator& allocator = *new PinnedAllocator;
  return allocator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    Guard().setDevice({kSim, device});
  }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice({kSim, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  // Random numbers are the CPU's, so that they are the same there.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  at::Device getDeviceFromPtr(void*) const override { return {kSim, current_device}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard on(storage.device());
    c10::DataPtr bigger = c10::GetAllocator(kSim)->allocate(bytes);
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) {
      machine().synchronize_all();
      std::memcpy(real_bytes(bigger.get()), real_bytes(storage.data()), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(bigger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

int machine_stream(c10::Stream stream) {
  if (stream.id() == 0) return default_stream(stream.device_index());
  return static_cast<int>(stream.id()) - 1;
}

int current_stream(c10::DeviceIndex device) { return machine_stream(stream_now(device)); }

void check_alive(c10::DeviceIndex device) {
  try {
    machine().check_device(device);
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
}

MemoryNumbers memory_numbers(int device) {
  const auto memory = device_memory(device);
  return {memory->capacity(), memory->used(), memory->peak()};
}

void reset_peak(int device) { device_memory(device)->reset_peak(); }

void begin_capture() {
  const int stream = current_stream(current_device);
  std::lock_guard lock(captures().mutex);
  captures().broken.emplace(stream, false);
}

bool end_capture() {
  const int stream = current_stream(current_device);
  std::lock_guard lock(captures().mutex);
  const auto ended = captures().broken.extract(stream);
  return !ended.empty() && !ended.mapped();
}

std::pair<uint64_t, uint64_t> event_counts() { return {events_recorded, events_waited}; }

void restart_streams() {
  std::lock_guard lock(pool().mutex);
  pool().taken.clear();
}

void register_device() {
  static DeviceAllocator& allocator = *new DeviceAllocator;
  c10::SetAllocator(kSim, &allocator, 100);
  at::setHostAllocator(kSim, &pinned_allocator(), 100);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

}  // namespace distorch::sim
