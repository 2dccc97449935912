// SPDX-License-Identifier: Apache-2.0
// Copies over links and within devices.
#pragma once

#include <ATen/core/Tensor.h>

namespace distorch::sim {

// The kernels of aten::_copy_from and aten::_copy_from_and_resize.
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking);
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination);

}  // namespace distorch::sim
