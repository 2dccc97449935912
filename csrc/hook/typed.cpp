// SPDX-License-Identifier: Apache-2.0
// Unboxed kernels for the operators that inference spends its calls on: the
// same five steps as the fallback, without building a stack.
#include "hook/call.h"

#include <ATen/ops/_scaled_mm_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/convolution_ops.h>
#include <ATen/ops/linear_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include "hook/errors.h"

namespace distorch {
namespace {

inline at::Tensor swapped(Call& call, Likeness likeness, const at::Tensor& tensor) {
  return call.read_only(tensor, likeness);
}

inline std::optional<at::Tensor> swapped(Call& call, Likeness likeness,
                                         const std::optional<at::Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return call.read_only(*tensor, likeness);
}

template <class Other>
const Other& swapped(Call&, Likeness, const Other& other) {
  return other;
}

// What a kernel asks of its arguments beside their bytes.
enum class Asks { kNothing, kGradInGradMode, kGrad };

template <Asks kAsks>
Likeness likeness() {
  if constexpr (kAsks == Asks::kGradInGradMode) {
    return c10::GradMode::is_enabled() ? Likeness::kExact : Likeness::kBytes;
  }
  return kAsks == Asks::kGrad ? Likeness::kExact : Likeness::kBytes;
}

// `Op` is a struct of at::_ops whose operator writes to no argument and
// returns no view of one.
template <class Op, Asks kAsks, class Signature = typename Op::schema>
struct Typed;

template <class Op, Asks kAsks, class Result, class... Args>
struct Typed<Op, kAsks, Result(Args...)> {
  static Result run(c10::DispatchKeySet keys, Args... args) {
    return at_border([&] {
      Call call;
      const Likeness like = likeness<kAsks>();
      return call.run(
          [&] { return Op::redispatch(below_hook(keys), swapped(call, like, args)...); });
    });
  }
};

template <class Op, Asks kAsks = Asks::kNothing>
void register_typed(torch::Library& library) {
  const std::string overload = Op::overload_name;
  const std::string name = overload.empty() ? Op::name : Op::name + ("." + overload);
  library.impl(name.c_str(), TORCH_FN((Typed<Op, kAsks>::run)));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CustomRNGKeyId, library) {
  register_typed<at::_ops::mm>(library);
  register_typed<at::_ops::addmm>(library);
  register_typed<at::_ops::bmm>(library);
  register_typed<at::_ops::baddbmm>(library);
  register_typed<at::_ops::convolution, Asks::kGradInGradMode>(library);
  register_typed<at::_ops::linear, Asks::kGrad>(library);
  register_typed<at::_ops::native_layer_norm>(library);
  register_typed<at::_ops::_scaled_mm>(library);
}

}  // namespace distorch
