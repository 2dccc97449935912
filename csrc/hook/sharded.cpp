// SPDX-License-Identifier: Apache-2.0
#include "hook/sharded.h"

#include <ATen/ops/empty.h>
#include <c10/core/AutogradState.h>
#include <c10/core/InferenceMode.h>

#include "device/device_donor.h"
#include "engine/ring.h"

namespace distorch {
namespace {

constexpr const char* kRawAccess =
    "this weight is sharded by distorch: its bytes are on a donor and only PyTorch operators "
    "bring them. Code that reads its memory directly (data_ptr, DLPack, a storage, a custom "
    "extension) needs distorch.materialize(weight), which returns an ordinary tensor with its "
    "values; to export a model with its weights, distorch.undistribute(model) first.";

void delete_handle(void* handle) { delete static_cast<Handle*>(handle); }

// While it lives, new tensors are inference tensors or are not. All that a
// c10::InferenceMode does beside this costs more than the rest of the hook.
class TensorsAre {
 public:
  explicit TensorsAre(bool inference)
      : state_(c10::AutogradState::get_tls_state()), before_(state_.get_inference_mode()) {
    state_.set_inference_mode(inference);
  }
  ~TensorsAre() { state_.set_inference_mode(before_); }
  TensorsAre(const TensorsAre&) = delete;
  TensorsAre& operator=(const TensorsAre&) = delete;

 private:
  c10::AutogradState& state_;
  const bool before_;
};

at::Tensor make_view(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  c10::TensorImpl* impl = view.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return view;
}

}  // namespace

Handle& handle_of(const at::Tensor& tensor) {
  const at::DataPtr& tag = tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  TORCH_CHECK(tag.get_deleter() == &delete_handle,
              "distorch: this tensor has the key of a sharded weight but another storage; it was "
              "made by code that replaces storages, which sharded weights do not support");
  return *static_cast<Handle*>(tag.get_context());
}

c10::Storage make_tagged_storage(Handle handle) {
  const auto bytes = static_cast<int64_t>(handle.weight->size());
  const c10::Device compute = handle.compute;
  auto* owned = new Handle(std::move(handle));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       at::DataPtr(nullptr, owned, &delete_handle, compute),
                       /*allocator=*/nullptr, /*resizable=*/false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(kRawAccess);
  return storage;
}

// Older PyTorch cannot take the error back.
template <class Storage>
void allow_reading_address(Storage& storage) {
  if constexpr (requires { storage.clear_data_ptr_access_error_msg_(); }) {
    storage.clear_data_ptr_access_error_msg_();
    storage.set_throw_on_mutable_data_ptr();
  } else {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "profiling sharded weights with shapes or stacks needs a newer PyTorch (2.13 has "
        "what it takes); profile without record_shapes and with_stack");
  }
}

void show_address(const at::Tensor& sharded, bool shown) {
  c10::StorageImpl& storage = *sharded.storage().unsafeGetStorageImpl();
  if (shown) {
    allow_reading_address(storage);
  } else {
    storage.release_data_and_set_meta_custom_data_ptr_error_msg_(kRawAccess);
  }
}

at::Tensor make_sharded(c10::Storage tagged, c10::ScalarType dtype, at::IntArrayRef sizes,
                        at::IntArrayRef strides, int64_t offset) {
  // An inference tensor could not become a parameter.
  c10::InferenceMode normal(false);
  const at::Tensor like = at::empty({0}, at::TensorOptions().dtype(dtype).device(tagged.device()));
  auto sharded = at::detail::make_tensor<c10::TensorImpl>(
      std::move(tagged), like.key_set().add(kHookKey), like.dtype());
  c10::TensorImpl* impl = sharded.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(sizes, strides);
  return sharded;
}

at::Tensor make_sharded_like(const at::Tensor& sharded, const at::Tensor& like) {
  const TensorsAre mode(like.is_inference());
  return make_view(sharded.storage(), like.key_set().add(kHookKey), like);
}

at::Tensor make_real(const at::Tensor& sharded, c10::Storage memory, Likeness likeness) {
  const c10::DispatchKeySet keys = sharded.key_set().remove(kHookKey);
  if (likeness == Likeness::kBytes) return make_view(std::move(memory), keys, sharded);
  const TensorsAre mode(sharded.is_inference());
  auto real = make_view(std::move(memory), keys, sharded);
  if (sharded.requires_grad()) real.set_requires_grad(true);
  return real;
}

void moved(Handle& handle, const std::byte* written) {
  Source now;  // ends after the mutex was given up
  handle.in_place.renew([&] {
    now = handle.weight->source();
    return in_place_memory(now, handle.compute);
  });
  handle.weight->changed(written);
}

c10::Storage fetch(Handle& handle) {
  process_fetches.fetch_add(1, std::memory_order_relaxed);
  if (c10::Storage memory = handle.in_place.memory()) {
    handle.weight->counters().hits.fetch_add(1, std::memory_order_relaxed);
    return memory;
  }
  const std::shared_ptr<void> slot = handle.weight->ring().acquire(*handle.weight);
  return *static_cast<c10::Storage*>(slot.get());
}

}  // namespace distorch
