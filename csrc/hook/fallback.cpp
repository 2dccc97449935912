#include "hook/fallback.h"

#include <torch/library.h>

#include "hook/call.h"
#include "hook/errors.h"

namespace distorch {

void run_with_real_weights(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                           torch::jit::Stack* stack) {
  at_border([&] {
    const c10::FunctionSchema& schema = op.schema();
    Call call;
    call.swap_arguments(schema, *stack);
    op.redispatchBoxed(below_hook(keys), stack);
    call.commit();
    call.wrap_results(*stack, schema.returns().size());
  });
}

TORCH_LIBRARY_IMPL(_, CustomRNGKeyId, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_with_real_weights>());
}

}  // namespace distorch
