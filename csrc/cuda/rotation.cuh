// SPDX-License-Identifier: Apache-2.0
// Turning weights back on a GPU.
#pragma once

#include <cstdint>

#include "core/element.h"

struct CUstream_st;

namespace distorch::cuda {

// What rotate_back (core/rotation.h) does, on device memory and on `stream`: the same bits.
// Numbers are rounded to `rounded_first` before. Returns the error of the launch, a cudaError_t
// (0: none).
int rotate_back(float* numbers, int64_t count, int64_t group, Element rounded_first,
                CUstream_st* stream);

}  // namespace distorch::cuda
