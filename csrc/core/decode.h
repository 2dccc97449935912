// SPDX-License-Identifier: Apache-2.0
// From a weight's stored rows to the rows that operators compute with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/merge.h"
#include "core/row_code.h"

namespace distorch {

// Rows that are float32 at one time, where they are not merged in place.
inline constexpr int64_t kPanelRows = 48;

// Factors on stored numbers: a grid of [rows / block_rows, columns /
// block_columns], row-major. One for all: blocks as large as the weight.
struct Scales {
  const float* data = nullptr;  // null: none
  int64_t block_rows = 1, block_columns = 1;
  int64_t per_row = 1;  // grid columns
};

// W' = round_once(turned_back(float(stored)) * scale + sum of low-rank terms), in float32. (Codes
// that are scaled before they are turned: see RowCode.)
struct Decoding {
  const RowCode* code;
  Scales scales;
  Element out;
  int64_t columns;
  std::span<const LowRank> terms;
  const float* table = nullptr;  // code->table numbers
  int64_t rotation = 0;          // numbers that were turned together (core/rotation.h); 0: none

  int64_t stored_row() const { return code->bytes_of(columns); }        // bytes
  int64_t decoded_row() const { return columns * element_bytes(out); }  // bytes
  // Whether the stored numbers are the weight's, but for the terms.
  bool in_place() const { return code->is == out && scales.data == nullptr && rotation == 0; }
  // What scaled numbers are rounded to before they are turned. A patched weight is rounded once.
  Element rounded_first() const { return terms.empty() ? out : Element::kFloat32; }
  // Whether the code alone makes the result, so that rows may be decoded in any pieces.
  bool code_alone() const {
    return code->to_element != nullptr && scales.data == nullptr && rotation == 0 && terms.empty();
  }
};

// Rows [begin, end); `stored` and `into` are where row `begin` starts, and the
// same memory only if in_place(). False when a term is not finite. `stores`: of
// blocks without scales and terms.
bool decode_rows(const Decoding& decoding, int64_t begin, int64_t end, const std::byte* stored,
                 std::byte* into, Stores stores = Stores::kCached);

}  // namespace distorch
