// What one thread of the kernel for plain numbers does; compiles for hosts too.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "cuda/dequantise_run.h"

namespace distorch::cuda {

// The i-th number of each type, exact in float32.
struct Float8E4M3FN {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    const uint32_t bits = from[i], sign = (bits & 0x80u) << 24, magnitude = bits & 0x7fu;
    if (magnitude == 0x7fu) return as_float(sign | 0x7fc00000u);
    if (magnitude < 8) return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-9f));
    return as_float(sign | ((magnitude << 20) + (120u << 23)));
  }
};
struct Float8E5M2 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return half_of(static_cast<uint32_t>(from[i]) << 8);
  }
};
struct Int8 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return static_cast<float>(static_cast<int8_t>(from[i]));
  }
};
struct UInt8 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return static_cast<float>(from[i]);
  }
};

// Where the scale of each number is; `data` null: there is none. A grid of one
// scale per block of numbers, row-major, `per_row` in a row.
struct ScaleGrid {
  const float* data;
  int64_t block_rows, block_columns, per_row;
};

// In 32 bits, of which GPUs divide many more than of 64; rows and columns fit.
DISTORCH_HD int64_t block_of(int64_t index, int64_t size) {
  return static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
}

// Number [row, column] of a matrix, times its scale.
template <class Type>
DISTORCH_HD float scaled(const uint8_t* from, int64_t row, int64_t column, int64_t columns,
                         const ScaleGrid& scales) {
  const float number = Type::number(from, row * columns + column);
  if (scales.data == nullptr) return number;
  const int64_t at =
      block_of(row, scales.block_rows) * scales.per_row + block_of(column, scales.block_columns);
  return number * scales.data[at];
}

}  // namespace distorch::cuda
