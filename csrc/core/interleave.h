// SPDX-License-Identifier: Apache-2.0
// Blocks from tensors that have one part of each: scales, and the numbers' bytes.
#pragma once

#include <cstdint>
#include <span>

namespace distorch {

// One part of every block, row by row: `bytes` bytes of each block.
struct Part {
  const uint8_t* data;
  int64_t bytes;
};

// Rows [begin, end) of `blocks` blocks each: of each block its bytes of every part, one part after
// the other. `into` is where row `begin` goes; parts begin at row 0.
void interleave_rows(std::span<const Part> parts, int64_t blocks, int64_t begin, int64_t end,
                     uint8_t* into);

}  // namespace distorch
