// What the host does with memory that devices copy from and to, told to a simulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distorch {

// Note [The host and copies]
// A device copies later than it was asked to. So the host must not write to memory that a copy
// still reads, nor read memory that a copy still writes. Nothing notices on a real device but wrong
// numbers. A simulator knows when each copy ends. It is told here of each such read and write of
// the host's, with a word on who did it, and says which ones nothing has ordered.
using HostAccess = void (*)(const void* data, uint64_t bytes, bool writes, const char* who);

// Null: nobody is told. The function stays valid.
void set_host_access(HostAccess told);

// Before the host reads, or writes, so many bytes from `data` on.
void host_reads(const std::byte* data, uint64_t bytes, const char* who);
void host_writes(const std::byte* data, uint64_t bytes, const char* who);

}  // namespace distorch
