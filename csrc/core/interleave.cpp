// SPDX-License-Identifier: Apache-2.0
#include "core/interleave.h"

#include <cstring>

namespace distorch {
namespace {

// A copy of a size that the compiler knows is one or two instructions.
template <int64_t kBytes>
void scatter(const uint8_t* from, int64_t blocks, int64_t step, uint8_t* into) {
  for (int64_t i = 0; i < blocks; ++i) std::memcpy(into + i * step, from + i * kBytes, kBytes);
}

void scatter_any(const uint8_t* from, int64_t blocks, int64_t bytes, int64_t step, uint8_t* into) {
  for (int64_t i = 0; i < blocks; ++i) {
    std::memcpy(into + i * step, from + i * bytes, static_cast<size_t>(bytes));
  }
}

}  // namespace

void interleave_rows(std::span<const Part> parts, int64_t blocks, int64_t begin, int64_t end,
                     uint8_t* into) {
  int64_t block = 0;
  for (const Part& part : parts) block += part.bytes;
  for (int64_t row = begin; row < end; ++row) {
    uint8_t* at = into + (row - begin) * blocks * block;
    for (const Part& part : parts) {
      const uint8_t* from = part.data + row * blocks * part.bytes;
      switch (part.bytes) {
        case 1:
          scatter<1>(from, blocks, block, at);
          break;
        case 4:
          scatter<4>(from, blocks, block, at);
          break;
        case 8:
          scatter<8>(from, blocks, block, at);
          break;
        case 32:
          scatter<32>(from, blocks, block, at);
          break;
        default:
          scatter_any(from, blocks, part.bytes, block, at);
      }
      at += part.bytes;
    }
  }
}

}  // namespace distorch
