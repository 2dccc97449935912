#include "core/decode.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/subnormals.h"

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
  if (decoding.terms.empty() && decoding.scales.data == nullptr &&
      decoding.code->to_element != nullptr) {
    decoding.code->to_element(stored, (end - begin) * columns, decoding.out, into, stores);
    return true;
  }
  std::vector<float> panel(std::min(kPanelRows, end - begin) * columns);
  bool finite = true;
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t last = std::min(end, row + kPanelRows);
    for (int64_t i = row; i < last; ++i) {
      float* values = panel.data() + (i - row) * columns;
      decoding.code->to_float(stored + (i - begin) * decoding.stored_row(), columns, values);
      if (decoding.scales.data != nullptr) scale_row(decoding.scales, i, columns, values);
    }
    finite &= merge_rows(Element::kFloat32, panel.data(), decoding.out,
                         into + (row - begin) * decoding.decoded_row(), row, last, columns,
                         decoding.terms);
  }
  return finite;
}

}  // namespace distorch
