// SPDX-License-Identifier: Apache-2.0
// What offsets, lengths and addresses are multiples of.
#pragma once

#include <algorithm>
#include <cstdint>

namespace distorch {

// Granule of unbuffered reads: offsets, lengths and addresses are multiples.
inline constexpr uint64_t kPage = 4096;

// Note [Alignment and last bits]
// A matrix product in fp32 or fp64 on the CPU gives other last bits when its
// operand starts 8 bytes off a 64-byte boundary, as weights in a checkpoint
// usually do; products of 16-bit and smaller floats are packed first and do
// not care. So the former are brought to a boundary (a copy, since unbuffered
// reads cannot shift bytes), the latter stay where the read puts them.
inline constexpr uint64_t kAlign = 64;
inline constexpr uint64_t kLooseAlign = 8;

constexpr uint64_t round_down(uint64_t value, uint64_t step) { return value - value % step; }
constexpr uint64_t round_up(uint64_t value, uint64_t step) {
  return round_down(value + step - 1, step);
}
// Whole granules that hold so many bytes: one at least.
constexpr uint64_t round_up_room(uint64_t bytes, uint64_t granule) {
  return round_up(std::max<uint64_t>(bytes, 1), granule);
}

}  // namespace distorch
