// SPDX-License-Identifier: Apache-2.0
// Host memory in pages of 2 MB where the system has some: it is filled in half
// the time, and read into with less work, since the kernel pins page by page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace distorch {

inline constexpr uint64_t kHugePage = 2 << 20;

// Memory of aligned_alloc.
struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using OwnMemory = std::unique_ptr<std::byte, FreeMemory>;

// `bytes` rounded up to whole pages of that size. Throws std::bad_alloc.
OwnMemory huge_pages(uint64_t bytes);

// The same for memory of others, before it is touched, if it is large.
void prefer_huge_pages(void* memory, uint64_t bytes);

}  // namespace distorch
