// SPDX-License-Identifier: Apache-2.0
// Low-rank merges on a GPU.
#pragma once

#include <cstdint>
#include <span>

#include "core/merge.h"

struct CUstream_st;

namespace distorch::cuda {

// What merge_rows (core/merge.h) does for all `rows`, on device memory and on
// `stream`: the same bits. `base_type` is `out_type` or float32. `finite` (on
// the device; may be null) becomes 0 when a product is not. `more_terms` has room
// on the device for terms beyond the first kTermsInLaunch.
// Returns the error of the launch, a cudaError_t (0: none).
int merge(Element base_type, const void* base, Element out_type, void* out, int64_t rows,
          int64_t columns, std::span<const LowRank> terms, void* more_terms, uint8_t* finite,
          CUstream_st* stream);

}  // namespace distorch::cuda
