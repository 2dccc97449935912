// Single rows of a decoded weight, without the rest of it.
#pragma once

#include <cstdint>
#include <span>

#include "engine/weight.h"

namespace distorch {

// Brings the rows of these numbers, one after the other, to `into`.
// REQUIRES: source.decoder is there; rows are within the weight.
// Throws Error(kFetch).
void gather_rows(const Source& source, std::span<const int64_t> rows, std::byte* into);

}  // namespace distorch
