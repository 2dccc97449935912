// SPDX-License-Identifier: Apache-2.0
// What the simulated device registers with PyTorch: views, allocations, copies,
// and the fallback for everything else.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "sim/call.h"
#include "sim/copies.h"

namespace distorch::sim {
namespace {

using torch::jit::Stack;

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  call_on_device(op, op, stack);
}

c10::OperatorHandle named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void convolution(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  call_on_device(op, named("aten::convolution"), stack);
}

// The same arguments but for the sizes of the bias, after the weight.
void convolution_backward(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  call_on_device(op, named("aten::convolution_backward"), stack, [](Stack& arguments) {
    const at::Tensor gradient = arguments[0].toTensor();
    const bool with_bias = arguments.back().toBoolList().get(2);
    arguments.insert(
        arguments.begin() + 3,
        with_bias ? c10::IValue(std::vector<int64_t>{gradient.size(1)}) : c10::IValue());
  });
}

at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                               std::optional<at::Layout>, std::optional<at::Device> device,
                               std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_generic(size, c10::GetAllocator(kSim),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kSim),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  int64_t count = self.storage_offset();
  count += c10::multiply_integers(size);
  const auto bytes = static_cast<size_t>(count) * self.itemsize();
  if (bytes > self.storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  std::vector<int64_t> strides = stride.vec();
  if (strides.empty()) {
    strides.resize(size.size());
    int64_t step = 1;
    for (size_t d = size.size(); d-- > 0; step *= std::max<int64_t>(size[d], 1)) strides[d] = step;
  }
  impl->set_sizes_and_strides(size, strides);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::GetAllocator(kSim)->allocate(0),
                    c10::GetAllocator(kSim), true);
  return set_storage(self, std::move(none), 0, {0}, {});
}

at::Scalar local_scalar(const at::Tensor& self) {
  TORCH_CHECK(mode() != Mode::kDry, "sim: a dry run has no values");
  machine().synchronize_stream(current_stream(self.device().index()));
  Mirror mirror(Mirror::Kind::kBytes);
  const PlainDispatch plain;
  return mirror.of(self).item();
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  c10::impl::VirtualGuardImpl(kSim).recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

bool is_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

// The CPU has a kernel of its own, and a device without one would get a
// composite, with other last bits.
bool has_composite_twin(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  if (!op.hasSchema() || op.schema().name() == "aten::_fused_sdp_choice") return false;
  const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
                         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
  return composite && op.hasKernelForDispatchKey(DispatchKey::CPU) &&
         !op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) && !is_view(op.schema());
}

}  // namespace

// The fallback runs it, as it runs every operator.
void decode_on_sim(const DecodeJob& job) {
  static const auto decode =
      named("distorch::decode_")
          .typed<void(at::Tensor, const at::Tensor&, c10::string_view,
                      const std::optional<at::Tensor>&, at::IntArrayRef, at::TensorList,
                      at::TensorList, at::ArrayRef<double>, at::IntArrayRef,
                      std::optional<at::Tensor>, const std::optional<at::Tensor>&, int64_t)>();
  const RowRecipe& recipe = job.recipe;
  const auto if_there = [](const at::Tensor& part) {
    return part.defined() ? std::optional(part) : std::nullopt;
  };
  std::vector<at::Tensor> ups, downs;
  std::vector<double> strengths;
  std::vector<int64_t> first_rows;
  for (const PatchTerm& term : job.terms) {
    ups.push_back(term.up);
    downs.push_back(term.down);
    strengths.push_back(term.scale);
    first_rows.push_back(term.first_row);
  }
  decode.call(job.into, job.stored, recipe.code->name, if_there(recipe.scales),
              {recipe.scale_rows, recipe.scale_columns}, ups, downs, strengths, first_rows,
              job.finite, if_there(recipe.table), recipe.rotation);
}

void register_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto& kept = *new std::vector<c10::RegistrationHandleRAII>;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !has_composite_twin(*op)) continue;
    kept.push_back(dispatcher.registerImpl(name, c10::DispatchKey::PrivateUse1,
                                           c10::KernelFunction::makeFromBoxedFunction<&fallback>(),
                                           std::nullopt, nullptr, "sim"));
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("convolution_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&convolution>());
  library.impl("convolution_backward_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

}  // namespace distorch::sim
