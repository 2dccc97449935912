// SPDX-License-Identifier: Apache-2.0
// Blocks to floating-point numbers, on a GPU.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/element.h"

struct CUstream_st;

namespace distorch::cuda {

// What dequantise (core/dequantise.h) does, on device memory and on `stream`:
// the same bits, NaN payloads aside. `into` is aligned to 16 bytes. Returns
// the error of the launch, a cudaError_t (0: none).
int dequantise(BlockType type, const void* from, int64_t blocks, const float* table,
               Element out_type, void* into, CUstream_st* stream);

}  // namespace distorch::cuda
