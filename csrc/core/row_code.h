// SPDX-License-Identifier: Apache-2.0
// How the rows of a weight may be stored: plain numbers of any width, or blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "core/dequantise.h"
#include "core/element.h"

namespace distorch {

struct RowCode {
  const char* name;           // "bfloat16", "float8_e4m3fn", "Q4_K"
  int64_t elements;           // of one block; 1 for plain numbers
  int64_t bytes;              // of one block
  std::optional<Element> is;  // for numbers that merges read as they are
  // `count` elements (whole blocks) as float32, exact or as the format defines it. `table` has the
  // numbers that all rows share, if there are any.
  void (*to_float)(const std::byte* from, int64_t count, const float* table, float* into);
  // The same as any element, rounded once; null: by way of float32.
  void (*to_element)(const std::byte* from, int64_t count, const float* table, Element type,
                     void* into, Stores stores);
  int64_t table = 0;  // numbers that all rows share
  // Whether numbers get their scale before they are turned back, and are then rounded to the
  // weight's type if it has no patches. Else they are turned first: sums of small integers are
  // exact.
  bool scaled_before_rotation = false;

  // REQUIRES: whole blocks.
  int64_t bytes_of(int64_t count) const { return count / elements * bytes; }
};

// Throws Error(kFormat) on a name that is none.
const RowCode& row_code(const std::string& name);

}  // namespace distorch
