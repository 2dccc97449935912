// SPDX-License-Identifier: Apache-2.0
#include "core/host_memory.h"

#include <sys/mman.h>

#include <new>

#include "core/file.h"

namespace distorch {
namespace {

constexpr uint64_t kLarge = 2 * kHugePage;

}  // namespace

OwnMemory huge_pages(uint64_t bytes) {
  const uint64_t room = round_up(bytes, kHugePage);
  OwnMemory memory(static_cast<std::byte*>(std::aligned_alloc(kHugePage, room)));
  if (memory == nullptr) throw std::bad_alloc();
  ::madvise(memory.get(), room, MADV_HUGEPAGE);  // advice, no more
  return memory;
}

void prefer_huge_pages(void* memory, uint64_t bytes) {
  if (bytes < kLarge) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uint64_t first = round_up(begin, kPage), last = round_down(begin + bytes, kPage);
  ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace distorch
