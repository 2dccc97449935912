// SPDX-License-Identifier: Apache-2.0
#include "hook/fallback.h"

#include <torch/library.h>

#include "hook/call.h"
#include "hook/errors.h"

namespace distorch {

void run_with_real_weights(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                           torch::jit::Stack* stack) {
  at_border([&] {
    Call call;
    call.run_boxed(op, below_hook(keys), *stack);
  });
}

TORCH_LIBRARY_IMPL(_, CustomRNGKeyId, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_with_real_weights>());
}

}  // namespace distorch
