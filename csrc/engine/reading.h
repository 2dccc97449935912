// From a donor's bytes to a weight's, on the host.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/error.h"
#include "engine/weight.h"

namespace distorch {

// The error of a fetch: names weight, donor and bytes.
Error could_not_bring(ErrorKind kind, const std::string& name, const Donor& donor,
                      const std::string& why);

// Bytes [begin, end) of a weight that is kept as it is, to `into`; up to a page
// on either side of it may be overwritten. Throws Error naming the whole.
void read_part(const Donor& donor, const std::string& name, uint64_t begin, uint64_t end,
               std::byte* into);

// Brings the rows of these numbers, one after the other, to `into`.
// REQUIRES: source.decoder is there; rows are within the weight.
// Throws Error(kFetch).
void gather_rows(const Source& source, std::span<const int64_t> rows, std::byte* into);

}  // namespace distorch
