// SPDX-License-Identifier: Apache-2.0
#include "device/storages.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/Allocator.h>

#include "core/file.h"
#include "core/host_memory.h"

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

void copy_bytes(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from, non_blocking);
}

c10::Storage memory_in_phase(uint64_t bytes, uint64_t offset) {
  c10::Allocator* allocator = c10::GetAllocator(c10::DeviceType::CPU);
  auto whole = std::make_unique<c10::DataPtr>(allocator->allocate(bytes + 3 * kPage));
  prefer_huge_pages(whole->get(), bytes);
  const auto first_page = round_up(reinterpret_cast<uintptr_t>(whole->get()), kPage);
  c10::DataPtr part(
      reinterpret_cast<void*>(first_page + offset % kPage), whole.get(),
      [](void* at) { delete static_cast<c10::DataPtr*>(at); }, at::kCPU);
  whole.release();
  return {c10::Storage::use_byte_size_t(), c10::SymInt(static_cast<int64_t>(bytes)),
          std::move(part), allocator, true};
}

}  // namespace distorch
