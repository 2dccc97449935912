// SPDX-License-Identifier: Apache-2.0
// The operator that stands for a weight in compiled graphs.
#include "hook/sharded.h"

#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "hook/call.h"
#include "hook/errors.h"

namespace distorch {
namespace {

// Note [Weights in compiled graphs]
// Generated kernels read pointers, so a graph has a node that brings each
// weight: `fetch` gives the real tensor, whose memory goes back to the ring
// when the graph lets go of it. It declares a new tensor although it gives out
// memory that others read: whoever compiles must not write to it
// (distorch/runtime/compiled.py sees to that). A CUDA graph would keep the address
// of one fetch, so the operator is tagged, and mode="reduce-overhead" captures
// what lies between fetches. `site` is not looked at; it keeps
// two uses of one weight apart, so that it is not held from one to the other.
using Signature = at::Tensor(const at::Tensor&, int64_t);

const c10::TypedOperatorHandle<Signature>& fetch_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("distorch::fetch", "").typed<Signature>();
  return op;
}

at::Tensor fetch_sharded(const at::Tensor& weight, int64_t) {
  return at_border([&] {
    Call call;
    return call.read_only(weight, Likeness::kExact);
  });
}

// For fake tensors, too: whoever plans memory sees that it is not the graph's.
at::Tensor fetch_plain(const at::Tensor& weight, int64_t) { return at::alias(weight); }

// The gradient of the real tensor is that of the sharded one.
class Fetch : public torch::autograd::Function<Fetch> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& weight,
                            int64_t site) {
    const at::Tensor detached = weight.detach();
    const at::AutoDispatchBelowADInplaceOrView below;
    return fetch_operator().call(detached, site);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list gradients) {
    return {gradients[0], at::Tensor()};
  }
};

at::Tensor fetch_with_gradient(const at::Tensor& weight, int64_t site) {
  if (c10::GradMode::is_enabled() && weight.requires_grad()) return Fetch::apply(weight, site);
  const at::AutoDispatchBelowADInplaceOrView below;
  return fetch_operator().call(weight, site);
}

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CustomRNGKeyId, library) { library.impl("fetch", &fetch_sharded); }

TORCH_LIBRARY_IMPL(distorch, CompositeExplicitAutograd, library) {
  library.impl("fetch", &fetch_plain);
}

TORCH_LIBRARY_IMPL(distorch, Autograd, library) { library.impl("fetch", &fetch_with_gradient); }

}  // namespace distorch
