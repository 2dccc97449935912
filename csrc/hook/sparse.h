// SPDX-License-Identifier: Apache-2.0
// Operators that take a dense weight beside a sparse tensor.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <vector>

namespace distorch {

// Note [Sparse arguments]
// Kernels of sparse tensors come before the hook's key and read dense arguments as memory. So those
// that take more than one tensor get a kernel of ours in front, which makes weights real and calls
// the old one. Calls without a sparse tensor never get here, and pay nothing.
//
// A sparse tensor keeps the tensors that it is made of, and its kernels cannot fetch. So one that
// is made of a weight gets a copy of the values.
inline constexpr std::array kSparseKeys{c10::DispatchKey::SparseCPU, c10::DispatchKey::SparseCUDA,
                                        c10::DispatchKey::SparseCsrCPU,
                                        c10::DispatchKey::SparseCsrCUDA};

// Whether a kernel of sparse tensors may meet a weight.
bool may_meet_weights(const c10::FunctionSchema& schema);
// The kernel to put in front of the one that an operator has for `key`.
c10::KernelFunction before_sparse_kernel(const c10::OperatorHandle& op, c10::DispatchKey key);
// The same for operators that make a sparse tensor.
c10::KernelFunction before_constructor(const c10::OperatorHandle& op, c10::DispatchKey key);
// The keys at which an operator has to be met because it makes a sparse tensor of others.
std::vector<c10::DispatchKey> keys_of_constructor(const c10::OperatorHandle& op);

}  // namespace distorch
