// SPDX-License-Identifier: Apache-2.0
// Plain numbers of any width, and their scales, to floating-point numbers, on a GPU.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/decode.h"

struct CUstream_st;

namespace distorch::cuda {

// into = round_once(float32(from) * scale) for `rows` rows, from row `begin` of
// the scales' grid on. Device memory; `from` and `into` may be the same only
// where both are float32. Returns the error of the launch, a cudaError_t (0:
// none); cudaErrorInvalidValue for a code that is no plain number's.
int scale(std::string_view code, const void* from, int64_t begin, int64_t rows, int64_t columns,
          const Scales& scales, Element out_type, void* into, CUstream_st* stream);

}  // namespace distorch::cuda
