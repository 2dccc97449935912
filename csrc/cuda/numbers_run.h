// SPDX-License-Identifier: Apache-2.0
// What one thread of the kernel for plain numbers does; compiles for hosts too.
#pragma once

#include <cstdint>

#include "core/plain_numbers.h"
#include "cuda/dequantise_run.h"

namespace distorch::cuda {

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
