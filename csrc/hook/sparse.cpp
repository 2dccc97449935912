// SPDX-License-Identifier: Apache-2.0
#include "hook/sparse.h"

#include <ATen/ops/clone.h>

#include <algorithm>
#include <string_view>

#include "hook/call.h"
#include "hook/errors.h"

namespace distorch {
namespace {

using c10::DispatchKey;
using torch::jit::Stack;

bool any_sharded(const c10::FunctionSchema& schema, const Stack& stack) {
  const auto first = stack.end() - static_cast<std::ptrdiff_t>(schema.arguments().size());
  return std::any_of(first, stack.end(), holds_sharded);
}

// Makes weights among the arguments real for a kernel that is called as it was before.
class MakesReal : public c10::OperatorKernel {
 public:
  explicit MakesReal(c10::SafeKernelFunction kernel) : kernel_(std::move(kernel)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (!any_sharded(op.schema(), *stack)) return kernel_.callBoxed(op, keys, stack);
    at_border([&] {
      Call call;
      call.run_boxed(op, *stack, [&] { kernel_.callBoxed(op, keys.remove(kHookKey), stack); });
    });
  }

 private:
  const c10::SafeKernelFunction kernel_;
};

// Copies weights among the arguments for a kernel whose result keeps them.
class Copies : public c10::OperatorKernel {
 public:
  explicit Copies(c10::SafeKernelFunction kernel) : kernel_(std::move(kernel)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    bool copied = false;
    for (size_t i = stack->size() - count; i < stack->size(); ++i) {
      c10::IValue& value = (*stack)[i];
      if (!value.isTensor() || !holds_sharded(value)) continue;
      value = at::clone(value.toTensor());
      copied = true;
    }
    kernel_.callBoxed(op, copied ? keys.remove(kHookKey) : keys, stack);
  }

 private:
  const c10::SafeKernelFunction kernel_;
};

}  // namespace

bool may_meet_weights(const c10::FunctionSchema& schema) {
  const auto& arguments = schema.arguments();
  const auto takes_tensors = [](const c10::Argument& argument) {
    return argument.type()->str().find("Tensor") != std::string::npos;
  };
  return std::count_if(arguments.begin(), arguments.end(), takes_tensors) > 1;
}

c10::KernelFunction before_sparse_kernel(const c10::OperatorHandle& op, DispatchKey key) {
  return c10::KernelFunction::makeFromBoxedFunctor(
      std::make_unique<MakesReal>(op.getComputedKernelForDispatchKey(key)));
}

c10::KernelFunction before_constructor(const c10::OperatorHandle& op, DispatchKey key) {
  return c10::KernelFunction::makeFromBoxedFunctor(
      std::make_unique<Copies>(op.getComputedKernelForDispatchKey(key)));
}

std::vector<DispatchKey> keys_of_constructor(const c10::OperatorHandle& op) {
  const std::string_view name = op.operator_name().name;
  // Below autograd, which knows it.
  if (name == "aten::_sparse_coo_tensor_with_dims_and_tensors" ||
      name == "aten::sparse_compressed_tensor") {
    return {DispatchKey::BackendSelect};
  }
  // A composite, which keeps the tensors itself.
  if (name == "aten::_sparse_compressed_tensor_unsafe") {
    return {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, kHookKey};
  }
  return {};
}

}  // namespace distorch
