// SPDX-License-Identifier: Apache-2.0
#include "device/pinned.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <map>
#include <string>

#include "core/file.h"
#include "core/mutex.h"
#include "device/cuda.h"
#include "device/storages.h"

namespace distorch {
namespace {

constexpr uint64_t kSlabBytes = 64 << 20;  // at least
// So many buffers of one size may wait for their copies. More may if all fit into one slab.
constexpr uint64_t kMostBehind = 4;
// Larger buffers for bytes that come back take ordinary memory: pinning takes longer than copying.
constexpr uint64_t kLargest = 256 << 20;

bool on_page(const void* address) { return reinterpret_cast<uintptr_t>(address) % kPage == 0; }

// Without this, the driver would pin and free memory by way of the first GPU, and make a context of
// hundreds of megabytes there.
void make_current(c10::OptionalDeviceGuard& guard, c10::Device device) {
  if (c10::impl::hasDeviceGuardImpl(device.type())) guard.reset_device(device);
}

// Memory of the kernels' library, and what it takes to give it back.
struct Exact {
  Exact(const cuda::Kernels* from, c10::Device of) : kernels(from), device(of) {}
  ~Exact() {
    if (memory == nullptr) return;
    try {
      c10::OptionalDeviceGuard on_device;
      make_current(on_device, device);
      kernels->free_pinned(device.index(), memory);
    } catch (const c10::Error&) {
      // The process is ending, and the driver with it.
    }
  }
  const cuda::Kernels* kernels;
  c10::Device device;
  void* memory = nullptr;
};

at::DataPtr exact_memory(const cuda::Kernels& kernels, uint64_t bytes, c10::Device device) {
  auto exact = std::make_unique<Exact>(&kernels, device);
  check_cuda(kernels, kernels.allocate_pinned(device.index(), &exact->memory, bytes),
             "allocating pinned memory");
  auto* memory = exact->memory;
  return {memory, exact.release(), [](void* held) { delete static_cast<Exact*>(held); },
          c10::Device(c10::kCPU)};
}

at::DataPtr allocate_pinned(uint64_t bytes, c10::Device device) {
  c10::OptionalDeviceGuard on_device;
  make_current(on_device, device);
  const cuda::Kernels* kernels = device.is_cuda() ? cuda_kernels() : nullptr;
  if (kernels != nullptr && bytes > 0) return exact_memory(*kernels, bytes, device);
  at::HostAllocator* allocator = at::getHostAllocator(device.type());
  TORCH_CHECK(allocator != nullptr, "this PyTorch has no pinned memory for ", device.type());
  return allocator->allocate(bytes);
}

// CUDA does not promise whole pages, and unbuffered reads need them.
at::DataPtr allocate_on_page(uint64_t bytes, c10::Device device) {
  at::DataPtr pinned = allocate_pinned(bytes, device);
  if (on_page(pinned.get())) return pinned;
  pinned.clear();
  auto whole = std::make_unique<at::DataPtr>(allocate_pinned(bytes + kPage, device));
  void* begin = reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(whole->get()), kPage));
  return {begin, whole.release(), [](void* held) { delete static_cast<at::DataPtr*>(held); },
          c10::Device(c10::kCPU)};
}

struct Known {
  Mutex mutex;
  std::map<std::string, std::weak_ptr<PinnedBuffers>> by_device GUARDED_BY(mutex);
};

// Never destroyed: rings may outlive every static object.
Known& known_buffers = *new Known;

}  // namespace

at::Tensor pinned_memory(uint64_t bytes, c10::Device device) {
  const auto count = static_cast<int64_t>(bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), count, allocate_on_page(bytes, device),
                       nullptr, false);
  at::Tensor pinned = at::empty({0}, at::TensorOptions().dtype(at::kByte));
  pinned.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  pinned.unsafeGetTensorImpl()->set_sizes_contiguous({count});
  return pinned;
}

std::shared_ptr<PinnedBuffers> PinnedBuffers::of(c10::Device device) {
  const MutexLock lock(known_buffers.mutex);
  std::weak_ptr<PinnedBuffers>& there = known_buffers.by_device[device.str()];
  if (auto buffers = there.lock()) return buffers;
  auto buffers = std::make_shared<PinnedBuffers>(device);
  there = buffers;
  return buffers;
}

std::shared_ptr<PinnedBuffers> PinnedBuffers::known(c10::Device device) {
  const MutexLock lock(known_buffers.mutex);
  const auto found = known_buffers.by_device.find(device.str());
  return found == known_buffers.by_device.end() ? nullptr : found->second.lock();
}

PinnedBuffers::Buffer::~Buffer() {
  Busy& mine = place_.front();
  const MutexLock lock(from_->mutex_);
  if (copied == nullptr) {
    mine.slab->arena.free(mine.range.begin, mine.range.end - mine.range.begin);
  } else {
    mine.copied = std::move(copied);
    from_->busy_.splice(from_->busy_.end(), place_);
  }
}

PinnedBuffers::~PinnedBuffers() {
  try {
    while (!busy_.empty()) wait_for_oldest();
  } catch (const c10::Error&) {
    // The device is out of order, and copies nothing any more.
  }
}

std::shared_ptr<PinnedBuffers::Buffer> PinnedBuffers::take(uint64_t bytes) {
  const uint64_t room = round_up_room(bytes, kPage);
  const MutexLock lock(mutex_);
  if (auto buffer = carve(room)) return buffer;  // the device need not be asked
  collect();
  for (;;) {
    if (auto buffer = carve(room)) return buffer;
    const uint64_t most = std::max(kSlabBytes, kMostBehind * room);
    if (slab_bytes_ + room > most) drop_idle_slabs();
    if (busy_.empty() || slab_bytes_ + room <= most) {
      add_slab(room);
    } else {
      wait_for_oldest();
    }
  }
}

std::shared_ptr<PinnedBuffers::Buffer> PinnedBuffers::carve(uint64_t bytes) {
  for (const auto& slab : slabs_) {
    const auto begin = slab->arena.allocate(bytes);
    if (!begin) continue;
    std::list<Busy> place;
    std::shared_ptr<Buffer> buffer;
    try {
      place.push_back({slab, {*begin, *begin + bytes}, nullptr});
      buffer = std::make_shared<Buffer>();
    } catch (...) {
      slab->arena.free(*begin, bytes);
      throw;
    }
    buffer->from_ = shared_from_this();
    buffer->place_ = std::move(place);
    buffer->data = static_cast<std::byte*>(slab->memory.mutable_data_ptr()) + *begin;
    return buffer;
  }
  return nullptr;
}

void PinnedBuffers::add_slab(uint64_t bytes) {
  const uint64_t size = std::max(bytes, kSlabBytes);
  slabs_.push_back(std::make_shared<Slab>(pinned_memory(size, device_), size));
  slab_bytes_ += size;
}

void PinnedBuffers::drop_idle_slabs() {
  std::erase_if(slabs_, [this](const auto& slab) REQUIRES(mutex_) {
    if (slab->arena.used() > 0) return false;
    slab_bytes_ -= slab->arena.capacity();
    return true;
  });
}

// Frees the buffers whose copies have ended. Copies end about in the order in which they were asked
// for, so this stops at the first one that has not ended: each question to the device costs time.
void PinnedBuffers::collect() {
  while (!busy_.empty() && has_ended(busy_.front().copied)) {
    const Busy done = std::move(busy_.front());
    busy_.pop_front();
    done.slab->arena.free(done.range.begin, done.range.end - done.range.begin);
  }
}

void PinnedBuffers::wait_for_oldest() {
  wait_until_ended(busy_.front().copied);
  collect();
}

std::shared_ptr<HostBuffer> host_buffer(uint64_t bytes, c10::Device device) {
  const auto pinned = bytes <= kLargest ? PinnedBuffers::known(device) : nullptr;
  if (pinned != nullptr) return pinned->take(bytes);
  struct Ordinary : HostBuffer {
    at::Tensor memory;
  };
  auto buffer = std::make_shared<Ordinary>();
  buffer->memory = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
  buffer->data = static_cast<std::byte*>(buffer->memory.mutable_data_ptr());
  return buffer;
}

std::shared_ptr<HostBuffer> bring_back(const c10::Storage& memory) {
  const c10::Device device = memory.device();
  const uint64_t bytes = memory.nbytes();
  auto buffer = host_buffer(bytes, device);
  const at::Tensor into = bytes_at(buffer->data, bytes, c10::Device(c10::kCPU));
  copy_bytes(bytes_at(static_cast<const std::byte*>(memory.data()), bytes, device), into, false);
  return buffer;
}

}  // namespace distorch
