// SPDX-License-Identifier: Apache-2.0
// What the host does with memory that devices copy from and to, told to a simulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distorch {

// Note [The host and copies]
// A device copies later than it was asked to. So the host must not write to memory that a copy
// still reads, nor read memory that a copy still writes. A real device gives wrong numbers then,
// and no error. A simulator knows when each copy ends. The engine tells it here what the host reads
// and writes, and for what purpose. The simulator reports each access that no event or wait has
// ordered.
using HostAccess = void (*)(const void* data, uint64_t bytes, bool writes, const char* who);

// Null: nobody is told. The function stays valid.
void set_host_access(HostAccess told);

// Before the host reads, or writes, so many bytes from `data` on.
void host_reads(const std::byte* data, uint64_t bytes, const char* who);
void host_writes(const std::byte* data, uint64_t bytes, const char* who);

}  // namespace distorch
