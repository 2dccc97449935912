// SPDX-License-Identifier: Apache-2.0
// Memory of the simulated devices: limited, apart from the host's, poisoned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/arena.h"
#include "core/file.h"
#include "sim/machine.h"

namespace distorch::sim {

// Note [Two addresses]
// The address that tensors carry lies in a range that nobody may touch, so
// that host code which reads device memory ends at once. The bytes are at a
// fixed distance from it, in a mapping that only the simulator's kernels use.
class DeviceMemory {
 public:
  DeviceMemory(int device, uint64_t capacity);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // The device's address for `bytes` used on `stream`, or null when there is
  // no room. Bytes that another stream gave back are waited for.
  std::byte* allocate(uint64_t bytes, int stream);
  void free(std::byte* address, uint64_t bytes, int stream);

  bool owns(const void* address) const {
    const auto* at = static_cast<const std::byte*>(address);
    return at >= base_ && at < base_ + capacity_;
  }
  std::byte* real(const void* address) const {
    return shadow_ + (static_cast<const std::byte*>(address) - base_);
  }

  uint64_t capacity() const { return capacity_; }
  uint64_t used() const;
  uint64_t peak() const;
  void reset_peak();
  // Bytes in use, beyond which allocations fail.
  void set_limit(uint64_t bytes);

 private:
  struct Freed {
    uint64_t end;
    int stream;
    MarkPtr mark;
  };

  const int device_;
  const uint64_t capacity_;
  std::byte* base_;
  std::byte* shadow_;
  mutable std::mutex mutex_;
  Arena arena_;                      // guarded by mutex_
  std::map<uint64_t, Freed> freed_;  // by offset; guarded by mutex_
  uint64_t peak_ = 0;                // guarded by mutex_
  uint64_t limit_ = capacity_;       // guarded by mutex_
};

// The memory of a device of the present configuration.
std::shared_ptr<DeviceMemory> device_memory(int device);
// New memories, as the configuration says; old blocks keep theirs.
void renew_memories();

// What memory holds that was given back, or that a copy has not reached yet.
void poison(std::byte* real, uint64_t bytes);

// Where the bytes of a device address are. Other addresses are their own.
std::byte* real_bytes(const void* address);

// Pinned host memory, exact in size but for whole pages. Giving it back waits for nothing, as CUDA
// promises nothing: a copy from it that is still to come is a race.
std::byte* allocate_pinned(uint64_t bytes);
void free_pinned(std::byte* address);
bool is_pinned(const void* address);
// PyTorch keeps pinned memory of its own tensors until copies that it was asked for have ended.
void keep_pinned_until(const void* address, const MarkPtr& ended);
uint64_t pinned_bytes();

// The nth allocation on the device from now (or on any, kHost) fails.
void fail_allocation(uint64_t nth, int device);

}  // namespace distorch::sim
