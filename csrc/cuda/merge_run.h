// SPDX-License-Identifier: Apache-2.0
// What one thread of the merge kernel does; compiles for hosts too.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/merge.h"
#include "core/portable.h"
#include "cuda/library.h"

namespace distorch::cuda {

// Elements of a thread's patch: rows that follow each other, columns `stride`
// apart, so that neighbours in a warp read neighbours in memory.
template <class Sum>
constexpr int kPatchRows = sizeof(Sum) == sizeof(float) ? 4 : 2;  // as registers allow
constexpr int kPatchColumns = 4;

// Terms of one launch: the first ones travel with its arguments, more are in memory.
constexpr int kInLaunch = static_cast<int>(kTermsInLaunch);
struct Terms {
  LowRank of[kInLaunch];
  const LowRank* more;
  int count;
};

DISTORCH_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

DISTORCH_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Where a thread's patch lies; rows and columns beyond the weight's are left out.
struct Patch {
  int64_t row, column, stride, rows, columns;  // the last two: of the weight
};

// Blocks of a grid, and threads of each: a warp per patch's height, side by side.
constexpr int kWarp = 32, kWarps = 8;
constexpr int64_t kMostHigh = 65535;  // blocks; more are stacked
struct MergeGrid {
  int64_t wide, high, stacked;
};

template <class Sum>
MergeGrid merge_grid(int64_t rows, int64_t columns) {
  const auto parts = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  const int64_t high = parts(rows, kWarps * kPatchRows<Sum>);
  return {parts(columns, kWarp * kPatchColumns), high < kMostHigh ? high : kMostHigh,
          parts(high, kMostHigh)};
}

// The patch of a thread of block `across`, and `down` blocks of all that are stacked.
template <class Sum>
DISTORCH_HD Patch merge_patch(int64_t across, int64_t down, int lane, int warp, int64_t rows,
                              int64_t columns) {
  return {(down * kWarps + warp) * kPatchRows<Sum>, across * kWarp * kPatchColumns + lane, kWarp,
          rows, columns};
}

// Adds all terms to `tile`, as Note [What a merge computes] (core/merge.h)
// says. False when a product is not finite.
template <class Sum>
DISTORCH_HD bool add_terms(const Terms& terms, const Patch& patch,
                           Sum tile[kPatchRows<Sum>][kPatchColumns]) {
  Sum checked = 0;
  for (int t = 0; t < terms.count; ++t) {
    const LowRank& term = t < kInLaunch ? terms.of[t] : terms.more[t - kInLaunch];
    const int64_t first = patch.row - term.first_row;
    if (first + kPatchRows<Sum> <= 0 || first >= term.rows) continue;  // it is for other rows
    Sum sums[kPatchRows<Sum>][kPatchColumns] = {};
    for (int64_t k = 0; k < term.rank; ++k) {
      Sum down[kPatchColumns];
      for (int j = 0; j < kPatchColumns; ++j) {
        const int64_t column = patch.column + j * patch.stride;
        down[j] = column < patch.columns ? term.down[k * patch.columns + column] : 0.0f;
      }
      for (int i = 0; i < kPatchRows<Sum>; ++i) {
        const int64_t row = patch.row + i - term.first_row;
        const Sum up = row >= 0 && row < term.rows ? term.up[row * term.rank + k] : 0.0f;
        for (int j = 0; j < kPatchColumns; ++j) sums[i][j] = fused(up, down[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kPatchRows<Sum>; ++i) {
      const int64_t row = patch.row + i - term.first_row;
      if (row < 0 || row >= term.rows) continue;  // adding zero would change -0
      for (int j = 0; j < kPatchColumns; ++j) {
        tile[i][j] = fused(static_cast<Sum>(term.scale), sums[i][j], tile[i][j]);
        checked += sums[i][j] * 0;  // NaN from here on if the product is not finite
      }
    }
  }
  return checked == checked;
}

}  // namespace distorch::cuda
