// SPDX-License-Identifier: Apache-2.0
// Low-rank merges: W' = round_once(float(W) + sum of scale * up @ down), tile by tile.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/element.h"

namespace distorch {

// scale * up @ down on rows [first_row, first_row + rows) of a weight, such as
// the queries' part of a fused projection. Row-major: `up` [rows, rank],
// `down` [rank, columns].
struct LowRank {
  const float* up;
  const float* down;
  int64_t rank;
  float scale;
  int64_t first_row;
  int64_t rows;
};

// Note [What a merge computes]
// Each element of a product is one chain of fused multiply-adds over the rank,
// in its order, from zero; products are added to the element with one more
// each, in the order given. So the bits depend on the numbers alone, not on
// tiles, threads or the width of the processor's vectors. The chain runs in
// float32, of a float32 result in float64: below it no rounding hides the sum's.

// Rows that are merged at one time; what is left is merged row by row.
inline constexpr int kTileRows = 6;

// Rows [begin, end) of a weight with `columns` columns. `base` and `out` are
// where row `begin` starts; factors start at row 0. `base` has elements of
// `base_type`, which is `out_type` (the two may then be the same memory) or
// float32. False when a product is not finite: `out` then holds it.
bool merge_rows(Element base_type, const void* base, Element out_type, void* out, int64_t begin,
                int64_t end, int64_t columns, std::span<const LowRank> terms);

// The same by each set of instructions that this processor has, the fastest last.
struct MergePath {
  const char* name;
  decltype(&merge_rows) merge;
};
std::vector<MergePath> merge_paths();

}  // namespace distorch
