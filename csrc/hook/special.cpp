// SPDX-License-Identifier: Apache-2.0
// Operators whose schema does not tell the hook what it has to know.
#include "hook/call.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/ctc_loss_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool1d_native.h>
#include <ATen/ops/tensor_split_native.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include "device/devices.h"
#include "device/pinned.h"
#include "device/storages.h"
#include "hook/errors.h"
#include "hook/fallback.h"

namespace distorch {
namespace {

// Batch norm writes its running statistics without declaring it.
void batch_norm(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  constexpr size_t kRunningMean = 3;
  constexpr size_t kRunningVar = 4;
  at_border([&] {
    const auto& schema = op.schema();
    const size_t first = stack->size() - schema.arguments().size();
    Call call;
    for (const size_t index : {kRunningMean, kRunningVar}) {
      c10::IValue& statistic = (*stack)[first + index];
      if (statistic.isTensor()) statistic = call.real(statistic.toTensor(), /*writes=*/true);
    }
    call.run_boxed(op, below_hook(keys), *stack);
  });
}

bool overwrites_everything(const at::Tensor& target) {
  const auto bytes = static_cast<uint64_t>(target.numel()) * target.itemsize();
  return target.is_contiguous() && target.storage_offset() == 0 &&
         bytes == target.storage().nbytes() && !target.is_conj() && !target.is_neg();
}

// A weight that is overwritten as a whole need not be fetched first.
at::Tensor& copy_(c10::DispatchKeySet keys, at::Tensor& self, const at::Tensor& source,
                  bool non_blocking) {
  return at_border([&]() -> at::Tensor& {
    Call call;
    const at::Tensor from = call.real(source);
    if (is_sharded(self) && overwrites_everything(self) && !handle_of(self).in_place) {
      Handle& handle = handle_of(self);
      const auto bytes = static_cast<uint64_t>(self.numel()) * self.itemsize();
      const std::shared_ptr<HostBuffer> buffer = host_buffer(bytes, from.device());
      const at::Tensor whole = bytes_at(buffer->data, bytes, c10::Device(c10::kCPU))
                                   .view(self.scalar_type())
                                   .view(self.sizes());
      whole.copy_(from);
      handle.weight->store(static_cast<const std::byte*>(whole.data_ptr()), whole.nbytes(), 0,
                           whole.nbytes());
      moved(handle);
      return self;
    }
    at::Tensor to = call.real(self, /*writes=*/true);
    at::_ops::copy_::redispatch(below_hook(keys), to, from, non_blocking);
    call.commit();
    return self;
  });
}

// Note [Nested arguments]
// The kernels of nested tensors come before the hook's key and read dense weights
// as memory. Operators that torch.nn calls with a padding mask are met a key
// earlier, at BackendSelect, where weights become real whatever else is nested.
// (For sparse tensors see Note [Sparse arguments].)
void before_backends(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                     torch::jit::Stack* stack) {
  at_border([&] {
    const auto below =
        c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
    Call call;
    call.run_boxed(op, (keys & below).remove(kHookKey), *stack);
  });
}

// Note [Values for Python]
// numpy(), tolist() and printing take their pointer from what resolve_neg()
// gives them. It is met at the autograd key, where its composite kernel would
// give back the sharded tensor itself.
at::Tensor resolve_neg(const at::Tensor& self) {
  return is_sharded(self) || self.is_neg() ? self.clone() : self;
}

// Note [Composites that read memory]
// A few composite kernels read numbers themselves, before they call any
// operator. They run where autograd does, so they are met there (and at the
// hook's key in inference mode, where nothing comes before it), with the same
// kernels over real tensors.
at::Tensor max_pool1d(const at::Tensor& self, at::IntArrayRef kernel, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  if (!is_sharded(self) || (c10::GradMode::is_enabled() && self.requires_grad())) {
    return at::native::max_pool1d(self, kernel, stride, padding, dilation, ceil_mode);
  }
  return at_border([&] {
    Call call;
    return at::native::max_pool1d(call.read_only(self, Likeness::kBytes), kernel, stride, padding,
                                  dilation, ceil_mode);
  });
}

std::vector<at::Tensor> tensor_split(const at::Tensor& self, const at::Tensor& sections,
                                     int64_t dim) {
  return at_border([&] {
    Call call;
    return at::native::tensor_split(self, call.read_only(sections, Likeness::kBytes), dim);
  });
}

at::Tensor ctc_loss(const at::Tensor& log_probs, const at::Tensor& targets,
                    const at::Tensor& input_lengths, const at::Tensor& target_lengths,
                    int64_t blank, int64_t reduction, bool zero_infinity) {
  return at_border([&] {
    Call call;
    return at::native::ctc_loss(log_probs, targets, call.read_only(input_lengths, Likeness::kBytes),
                                call.read_only(target_lengths, Likeness::kBytes), blank, reduction,
                                zero_infinity);
  });
}

void meet_reading_composites(torch::Library& library) {
  library.impl("max_pool1d", TORCH_FN(max_pool1d));
  library.impl("tensor_split.tensor_indices_or_sections", TORCH_FN(tensor_split));
  library.impl("ctc_loss.Tensor", TORCH_FN(ctc_loss));
}

bool is_pinned(c10::DispatchKeySet, const at::Tensor&, std::optional<at::Device>) { return false; }

void record_stream(c10::DispatchKeySet, at::Tensor&, at::Stream) {
  // Fetched memory is ordered by the ring; a donor is not used by streams.
}

// `p.set_(q)` is `p.data = q`: p is sharded afterwards if q is.
at::Tensor& set_to_tensor(at::Tensor& self, const at::Tensor& source) {
  if (!self.is_same(source)) {
    self.unsafeGetTensorImpl()->shallow_copy_from(source.getIntrusivePtr());
  }
  return self;
}

void refuse_set(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK(
      false,
      "set_(storage) on a weight that is sharded by distorch: its storage is a tag, not "
      "memory. Assign new values with copy_(), or call distorch.undistribute(model) first.");
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CustomRNGKeyId, library) {
  const auto boxed_batch_norm = [] {
    return torch::CppFunction::makeFromBoxedFunction<&batch_norm>();
  };
  library.impl("native_batch_norm", boxed_batch_norm());
  library.impl("cudnn_batch_norm", boxed_batch_norm());
  library.impl("miopen_batch_norm", boxed_batch_norm());
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("is_pinned", TORCH_FN(is_pinned));
  library.impl("resolve_neg", TORCH_FN(resolve_neg));
  library.impl("record_stream", TORCH_FN(record_stream));
  meet_reading_composites(library);
  library.impl("resize_", torch::CppFunction::makeFromBoxedFunction<&run_with_real_weights>());
  library.impl("set_.source_Tensor", TORCH_FN(set_to_tensor));
  for (const char* overload : {"set_", "set_.source_Storage", "set_.source_Storage_storage_offset",
                               "set_.source_Tensor_storage_offset"}) {
    library.impl(overload, torch::CppFunction::makeFromBoxedFunction<&refuse_set>());
  }
}

TORCH_LIBRARY_IMPL(aten, AutogradCPU, library) {
  library.impl("resolve_neg", TORCH_FN(resolve_neg));
  meet_reading_composites(library);
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) { meet_reading_composites(library); }

TORCH_LIBRARY_IMPL(aten, BackendSelect, library) {
  for (const char* name : {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&before_backends>());
  }
}

}  // namespace distorch
