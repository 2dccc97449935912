#include "device/pinned.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <map>
#include <string>

#include "core/file.h"
#include "device/cuda.h"
#include "device/storages.h"

namespace distorch {
namespace {

constexpr uint64_t kSlabBytes = 64 << 20;        // at least
constexpr uint64_t kManyBytes = 4 * kSlabBytes;  // beyond which copies are waited for instead

bool on_page(const void* address) { return reinterpret_cast<uintptr_t>(address) % kPage == 0; }

// Else memory would be pinned, or given back, by way of the first GPU, in a context that takes
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
  struct Known {
    std::mutex mutex;
    std::map<std::string, std::weak_ptr<PinnedBuffers>> by_device;  // guarded by mutex
  };
  static Known& known = *new Known;  // never destroyed: rings may outlive every static object
  std::lock_guard lock(known.mutex);
  std::weak_ptr<PinnedBuffers>& there = known.by_device[device.str()];
  if (auto buffers = there.lock()) return buffers;
  auto buffers = std::make_shared<PinnedBuffers>(device);
  there = buffers;
  return buffers;
}

PinnedBuffers::Buffer::~Buffer() {
  std::lock_guard lock(from_->mutex_);
  if (copied == nullptr) {
    from_->slabs_[slab_]->arena.free(range_.begin, range_.end - range_.begin);
  } else {
    from_->busy_.push_back({slab_, range_, std::move(copied)});
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
  const uint64_t room = round_up(std::max<uint64_t>(bytes, 1), kPage);
  std::lock_guard lock(mutex_);
  collect();
  for (;;) {
    if (auto buffer = carve(room)) return buffer;
    if (busy_.empty() || slab_bytes_ + room <= std::max(kManyBytes, 4 * room)) {
      add_slab(room);
    } else {
      wait_for_oldest();
    }
  }
}

std::shared_ptr<PinnedBuffers::Buffer> PinnedBuffers::carve(uint64_t bytes) {
  for (size_t i = 0; i < slabs_.size(); ++i) {
    const auto begin = slabs_[i]->arena.allocate(bytes);
    if (!begin) continue;
    auto buffer = std::make_shared<Buffer>();
    buffer->from_ = shared_from_this();
    buffer->slab_ = i;
    buffer->range_ = {*begin, *begin + bytes};
    buffer->data = static_cast<std::byte*>(slabs_[i]->memory.mutable_data_ptr()) + *begin;
    return buffer;
  }
  return nullptr;
}

void PinnedBuffers::add_slab(uint64_t bytes) {
  const uint64_t size = std::max(bytes, kSlabBytes);
  slabs_.push_back(std::make_unique<Slab>(pinned_memory(size, device_), size));
  slab_bytes_ += size;
}

// Buffers whose copies have ended are free again.
void PinnedBuffers::collect() {
  std::erase_if(busy_, [this](const Busy& busy) {
    if (!busy.copied->query()) return false;
    slabs_[busy.slab]->arena.free(busy.range.begin, busy.range.end - busy.range.begin);
    return true;
  });
}

void PinnedBuffers::wait_for_oldest() {
  busy_.front().copied->synchronize();
  collect();
}

std::shared_ptr<Staged> bring_back(const c10::Storage& memory) {
  const c10::Device device = memory.device();
  const uint64_t bytes = memory.nbytes();
  const auto buffer = PinnedBuffers::of(device)->take(bytes);
  const at::Tensor into = bytes_at(buffer->data, bytes, c10::Device(c10::kCPU));
  copy_bytes(bytes_at(static_cast<const std::byte*>(memory.data()), bytes, device), into, false);
  return buffer;
}

}  // namespace distorch
