// SPDX-License-Identifier: Apache-2.0
// What an operator does when a sharded tensor reaches it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace distorch {

// Note [How a weight comes back]
// 1. op(x, w) has passed autograd, which saved the sharded w.
// 2. The sharded arguments are swapped for real tensors over fetched memory.
// 3. The operator runs below the hook, on its ordinary kernel.
// 4. What it wrote goes to the donors.
// 5. Results that are arguments, or views of them, become sharded again, and
//    the fetched memory is let go.
void run_with_real_weights(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                           torch::jit::Stack* stack);

}  // namespace distorch
