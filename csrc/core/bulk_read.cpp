// SPDX-License-Identifier: Apache-2.0
#include "core/bulk_read.h"

#include <algorithm>

#include "core/file.h"
#include "core/parts.h"

namespace distorch {
namespace {

constexpr uint64_t kPartBytes = 4 << 20;

}  // namespace

void bulk_read(const File& file, uint64_t offset, uint64_t bytes, std::byte* into, size_t threads,
               bool slack) {
  const uint64_t lead = offset % kPage;  // parts end at pages of the file, so that none share one
  const uint64_t parts = (lead + bytes + kPartBytes - 1) / kPartBytes;
  for_parts(parts, threads, [&](uint64_t part) {
    const uint64_t begin = part == 0 ? 0 : part * kPartBytes - lead;
    const uint64_t end = std::min((part + 1) * kPartBytes - lead, bytes);
    file.read(offset + begin, end - begin, into + begin, slack);
  });
}

}  // namespace distorch
