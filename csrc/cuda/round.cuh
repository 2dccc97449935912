// SPDX-License-Identifier: Apache-2.0
// Rounding once, to nearest even, to the type that a kernel writes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace distorch::cuda {

__device__ inline void round_to(double value, float* into) { *into = static_cast<float>(value); }
__device__ inline void round_to(float value, float* into) { *into = value; }
__device__ inline void round_to(float value, __half* into) { *into = __float2half_rn(value); }
__device__ inline void round_to(float value, __nv_bfloat16* into) {
  *into = __float2bfloat16_rn(value);
}

}  // namespace distorch::cuda
