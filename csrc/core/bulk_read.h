// SPDX-License-Identifier: Apache-2.0
// One large read by several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distorch {

class File;

// Exactly [offset, offset + bytes) of the file into memory of the caller, whose
// page on either side is the caller's, too, if `slack` says so (File::read).
// Throws Error(kFetch).
void bulk_read(const File& file, uint64_t offset, uint64_t bytes, std::byte* into, size_t threads,
               bool slack = false);

}  // namespace distorch
