// SPDX-License-Identifier: Apache-2.0
// One call of an operator on the simulated device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <unordered_map>

#include "sim/device.h"
#include "sim/memory.h"

namespace distorch::sim {

inline Machine& machine() { return Machine::instance(); }
inline Mode mode() { return machine().config().mode; }
inline bool on_sim(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSim;
}

// Tensors over other memory, one storage for each storage they come from.
class Mirror {
 public:
  enum class Kind { kMeta, kBytes };
  explicit Mirror(Kind kind) : kind_(kind) {}

  at::Tensor of(const at::Tensor& tensor) {
    const c10::StorageImpl* known = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(known);
    if (found == storages_.end()) found = storages_.emplace(known, make_storage(tensor)).first;
    const auto key = kind_ == Kind::kMeta ? c10::DispatchKey::Meta : c10::DispatchKey::CPU;
    auto mirrored = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(key), tensor.dtype());
    c10::TensorImpl* impl = mirrored.unsafeGetTensorImpl();
    impl->set_storage_offset(tensor.storage_offset());
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    mirrored._set_conj(tensor.is_conj());
    mirrored._set_neg(tensor.is_neg());
    return mirrored;
  }

 private:
  c10::Storage make_storage(const at::Tensor& tensor) const {
    const size_t bytes = tensor.storage().nbytes();
    const bool meta = kind_ == Kind::kMeta;
    void* data = meta || bytes == 0 ? nullptr : real_bytes(tensor.storage().data());
    const c10::Device device(meta ? c10::kMeta : c10::kCPU);
    return c10::Storage(c10::Storage::use_byte_size_t(), bytes, at::DataPtr(data, device),
                        c10::GetAllocator(device.type()), /*resizable=*/meta);
  }

  const Kind kind_;
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_;
};

// The state in which queued kernels run, whatever thread plays the queue.
class PlainDispatch {
  c10::impl::ForceDispatchKeyGuard guard_{
      c10::default_included_set,
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset};
};

// New memory on a device, with the shape, strides and dtype of `geometry`.
at::Tensor empty_on(const at::Tensor& geometry, c10::Device device);

// Runs `run` on the arguments of `op` (the top of the stack): the CPU's kernel,
// at its virtual time, over the device's bytes. `run` is `op` itself, or the
// operator that it stands for; `adapt` may change the arguments then.
void call_on_device(const c10::OperatorHandle& op, const c10::OperatorHandle& run,
                    torch::jit::Stack* stack,
                    const std::function<void(torch::jit::Stack&)>& adapt = {});

}  // namespace distorch::sim
