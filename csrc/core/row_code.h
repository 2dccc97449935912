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
  // `count` elements (whole blocks) as float32, exact or as the format defines it.
  void (*to_float)(const std::byte* from, int64_t count, float* into);
  // The same as any element, rounded once; null: by way of float32.
  void (*to_element)(const std::byte* from, int64_t count, Element type, void* into, Stores stores);

  // REQUIRES: whole blocks.
  int64_t bytes_of(int64_t count) const { return count / elements * bytes; }
};

// Throws Error(kFormat) on a name that is none.
const RowCode& row_code(const std::string& name);

}  // namespace distorch
