// SPDX-License-Identifier: Apache-2.0
#include "core/decode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "core/rotation.h"
#include "core/subnormals.h"

// Loops become vectors at this level only.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

namespace distorch {
namespace {

void scale_row(const Scales& scales, int64_t row, int64_t columns, float* values) {
  const float* grid = scales.data + row / scales.block_rows * scales.per_row;
  for (int64_t first = 0; first < columns; first += scales.block_columns) {
    const int64_t last = std::min(columns, first + scales.block_columns);
    const float factor = grid[first / scales.block_columns];
    for (int64_t j = first; j < last; ++j) values[j] *= factor;
  }
}

template <Element kType>
void round_to(int64_t columns, float* values) {
  for (int64_t j = 0; j < columns; ++j) values[j] = rounded_to(kType, values[j]);
}

void round_row(Element type, int64_t columns, float* values) {
  if (type == Element::kFloat16) round_to<Element::kFloat16>(columns, values);
  if (type == Element::kBFloat16) round_to<Element::kBFloat16>(columns, values);
}

}  // namespace

bool decode_rows(const Decoding& decoding, int64_t begin, int64_t end, const std::byte* stored,
                 std::byte* into, Stores stores) {
  const KeepSubnormals keep;
  const int64_t columns = decoding.columns;
  if (decoding.in_place()) {
    if (decoding.terms.empty()) {
      if (stored != into) std::memmove(into, stored, (end - begin) * decoding.stored_row());
      return true;
    }
    return merge_rows(decoding.out, stored, decoding.out, into, begin, end, columns,
                      decoding.terms);
  }
  if (decoding.code_alone()) {
    decoding.code->to_element(stored, (end - begin) * columns, decoding.table, decoding.out, into,
                              stores);
    return true;
  }
  std::vector<float> panel(std::min(kPanelRows, end - begin) * columns);
  bool finite = true;
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t last = std::min(end, row + kPanelRows);
    for (int64_t i = row; i < last; ++i) {
      float* values = panel.data() + (i - row) * columns;
      decoding.code->to_float(stored + (i - begin) * decoding.stored_row(), columns, decoding.table,
                              values);
      if (decoding.code->scaled_before_rotation) {
        if (decoding.scales.data != nullptr) scale_row(decoding.scales, i, columns, values);
        if (decoding.rotation > 0) {
          round_row(decoding.rounded_first(), columns, values);
          rotate_back(values, columns, decoding.rotation);
        }
      } else {
        if (decoding.rotation > 0) rotate_back(values, columns, decoding.rotation);
        if (decoding.scales.data != nullptr) scale_row(decoding.scales, i, columns, values);
      }
    }
    finite &= merge_rows(Element::kFloat32, panel.data(), decoding.out,
                         into + (row - begin) * decoding.decoded_row(), row, last, columns,
                         decoding.terms);
  }
  return finite;
}

}  // namespace distorch
