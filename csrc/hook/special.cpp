// Operators whose schema does not tell the hook what it has to know.
#include "hook/call.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "device/devices.h"
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
    call.swap_arguments(schema, *stack);
    op.redispatchBoxed(below_hook(keys), stack);
    call.commit();
    call.wrap_results(*stack, schema.returns().size());
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
      const at::Tensor whole = at::empty(self.sizes(), at::TensorOptions().dtype(self.dtype()));
      whole.copy_(from);
      handle.weight->store(static_cast<const std::byte*>(whole.data_ptr()), whole.nbytes(), 0,
                           whole.nbytes(), scratch_directory());
      handle.weight->ring().written(*handle.weight, nullptr);
      return self;
    }
    at::Tensor to = call.real(self, /*writes=*/true);
    at::_ops::copy_::redispatch(below_hook(keys), to, from, non_blocking);
    call.commit();
    return self;
  });
}

// Note [Nested activations]
// The kernels of nested tensors come before the hook's key and read weights as
// memory. The ones that torch.nn itself calls with a padding mask are met a key
// earlier, at BackendSelect, where weights become real whatever else is nested.
void transformer_layer(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                       torch::jit::Stack* stack) {
  at_border([&] {
    const c10::FunctionSchema& schema = op.schema();
    const auto below =
        c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
    Call call;
    call.swap_arguments(schema, *stack);
    op.redispatchBoxed((keys & below).remove(kHookKey), stack);
    call.commit();
    call.wrap_results(*stack, schema.returns().size());
  });
}

// Note [Values for Python]
// numpy(), tolist() and printing take their pointer from what resolve_neg()
// gives them. It is met at the autograd key, where its composite kernel would
// give back the sharded tensor itself.
at::Tensor resolve_neg(const at::Tensor& self) {
  return is_sharded(self) || self.is_neg() ? self.clone() : self;
}

bool is_pinned(c10::DispatchKeySet, const at::Tensor&, std::optional<at::Device>) { return false; }

void record_stream(c10::DispatchKeySet, at::Tensor&, at::Stream) {
  // Fetched memory is ordered by the ring; a donor is not used by streams.
}

void refuse_set(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK(false,
              "set_() on a weight that is sharded by distorch: its storage is a tag, not memory. "
              "Assign new values with copy_(), or call distorch.undistribute(model) first.");
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
  library.impl("resize_", torch::CppFunction::makeFromBoxedFunction<&run_with_real_weights>());
  for (const char* overload : {"set_", "set_.source_Storage", "set_.source_Storage_storage_offset",
                               "set_.source_Tensor", "set_.source_Tensor_storage_offset"}) {
    library.impl(overload, torch::CppFunction::makeFromBoxedFunction<&refuse_set>());
  }
}

TORCH_LIBRARY_IMPL(aten, AutogradCPU, library) {
  library.impl("resolve_neg", TORCH_FN(resolve_neg));
}

TORCH_LIBRARY_IMPL(aten, BackendSelect, library) {
  for (const char* name : {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&transformer_layer>());
  }
}

}  // namespace distorch
