#include "device/storages.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>

#include "core/file.h"
#include "core/host_memory.h"
#include "device/cuda.h"

namespace distorch {

std::shared_ptr<void> slot_storage(std::byte* data, uint64_t bytes, std::shared_ptr<void> block,
                                   c10::Device device) {
  auto* owner = new std::shared_ptr<void>(std::move(block));
  at::DataPtr pointer(
      data, owner, [](void* held) { delete static_cast<std::shared_ptr<void>*>(held); }, device);
  // Resizable: an `out=` argument may grow.
  return std::make_shared<c10::Storage>(c10::Storage::use_byte_size_t(),
                                        static_cast<int64_t>(bytes), std::move(pointer),
                                        c10::GetAllocator(device.type()), /*resizable=*/true);
}

bool slot_in_use(const std::shared_ptr<void>& storage) {
  return storage.use_count() > 1 || static_cast<c10::Storage*>(storage.get())->use_count() > 1;
}

at::Tensor bytes_at(const std::byte* data, uint64_t bytes, c10::Device device) {
  const auto count = static_cast<int64_t>(bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), count,
                       at::DataPtr(const_cast<std::byte*>(data), device), nullptr, false);
  const c10::DispatchKey key = c10::computeDispatchKey(c10::kByte, c10::kStrided, device);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(c10::kByte));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({count});
  return tensor;
}

namespace {

at::DataPtr allocate_pinned(uint64_t bytes, c10::Device device) {
  // Else the memory would be pinned by way of the first GPU, in a context that
  // takes hundreds of megabytes there.
  c10::OptionalDeviceGuard on_device;
  if (c10::impl::hasDeviceGuardImpl(device.type())) on_device.reset_device(device);
  const cuda::Kernels* kernels = device.is_cuda() ? cuda_kernels() : nullptr;
  if (kernels == nullptr || bytes == 0) {
    at::HostAllocator* allocator = at::getHostAllocator(device.type());
    TORCH_CHECK(allocator != nullptr, "this PyTorch has no pinned memory for ", device.type());
    return allocator->allocate(bytes);
  }
  void* memory = nullptr;
  check_cuda(*kernels, kernels->allocate_pinned(device.index(), &memory, bytes),
             "allocating pinned memory");
  const auto release = [](void* at) { cuda_kernels()->free_pinned(at); };
  return {memory, memory, release, c10::Device(c10::kCPU)};
}

}  // namespace

c10::Storage memory_in_phase(uint64_t bytes, uint64_t offset) {
  c10::Allocator* allocator = c10::GetAllocator(c10::DeviceType::CPU);
  auto whole = std::make_unique<c10::DataPtr>(allocator->allocate(bytes + 3 * kPage));
  prefer_huge_pages(whole->get(), bytes);
  const auto first_page = round_up(reinterpret_cast<uintptr_t>(whole->get()), kPage);
  c10::DataPtr part(
      reinterpret_cast<void*>(first_page + offset % kPage), whole.get(),
      [](void* at) { delete static_cast<c10::DataPtr*>(at); }, at::kCPU);
  whole.release();
  return {c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes), std::move(part), allocator,
          true};
}

at::Tensor pinned_memory(uint64_t bytes, c10::Device device) {
  const auto count = static_cast<int64_t>(bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), count, allocate_pinned(bytes, device),
                       nullptr, false);
  at::Tensor pinned = at::empty({0}, at::TensorOptions().dtype(at::kByte));
  pinned.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  pinned.unsafeGetTensorImpl()->set_sizes_contiguous({count});
  return pinned;
}

}  // namespace distorch
