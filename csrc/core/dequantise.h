// SPDX-License-Identifier: Apache-2.0
// Blocks to floating-point numbers, on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "core/blocks.h"
#include "core/element.h"

namespace distorch {

// Note [What decoding computes]
// Numbers are computed in float32 as gguf-py (or comfy-kitchen) does, operation by operation
// (see Note [A block's description]), then rounded once, to nearest even, to the
// type asked for. Every path gives the same bits. NaN stays NaN.

// Whether what is written goes to the caches or past them: past them is faster
// for results that no cache holds.
enum class Stores { kCached, kStreamed };
inline constexpr uint64_t kPastCaches = 32 << 20;  // bytes: so large a result is in no cache

// `blocks` blocks from `from` (any address) to `into`, blocks * elements numbers
// of `out_type`. `table` has what blocks of this type share (BlockInfo::table).
// REQUIRES: `into` is aligned to its numbers; the two do not overlap.
void dequantise(BlockType type, const void* from, int64_t blocks, Element out_type, void* into,
                Stores stores = Stores::kCached, const float* table = nullptr);

// The same for each width of vectors that this processor has, for tests.
struct DequantisePath {
  const char* name;
  decltype(&dequantise) run;
};
std::vector<DequantisePath> dequantise_paths();

}  // namespace distorch
