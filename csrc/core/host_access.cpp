// SPDX-License-Identifier: Apache-2.0
#include "core/host_access.h"

#include <atomic>

namespace distorch {
namespace {

std::atomic<HostAccess> told{nullptr};

void tell(const std::byte* data, uint64_t bytes, bool writes, const char* who) {
  if (const HostAccess access = told.load(std::memory_order_relaxed)) {
    access(data, bytes, writes, who);
  }
}

}  // namespace

void set_host_access(HostAccess access) { told = access; }

void host_reads(const std::byte* data, uint64_t bytes, const char* who) {
  tell(data, bytes, false, who);
}

void host_writes(const std::byte* data, uint64_t bytes, const char* who) {
  tell(data, bytes, true, who);
}

}  // namespace distorch
