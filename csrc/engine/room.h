// SPDX-License-Identifier: Apache-2.0
// The memory of a ring, and the part of it that is one slot's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "core/mutex.h"

namespace distorch {

// One allocation, divided by an Arena; rooms keep it alive. It has a mutex of its own, because the
// last holder of a room may let go of it in any thread.
class Region {
 public:
  Region(std::shared_ptr<std::byte> memory, uint64_t bytes, uint64_t granule)
      : memory_(std::move(memory)), arena_(bytes, granule) {}

  // The arena, held as long as this lives: region.arena()->used().
  class Held {
   public:
    explicit Held(Region& region) : lock_(region.mutex_), arena_(region.arena_) {}
    Arena* operator->() const { return &arena_; }

   private:
    const MutexLock lock_;
    Arena& arena_;
  };
  Held arena() { return Held(*this); }
  uint64_t capacity() const { return arena_.capacity(); }
  std::byte* data() const { return memory_.get(); }

 private:
  const std::shared_ptr<std::byte> memory_;
  Mutex mutex_;
  Arena arena_;  // guarded by mutex_, but for its capacity
};

// A range of a region that is taken as it becomes free, and given back with
// this object. See Note [Rooms that become free by and by].
class Room {
 public:
  // Nothing of it is taken yet.
  Room(std::shared_ptr<Region> region, Range range)
      : region_(std::move(region)), range_(range), missing_{range} {}
  // REQUIRES: `range` was allocated from the region's arena.
  static std::shared_ptr<Room> taken(std::shared_ptr<Region> region, Range range);
  ~Room();
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  std::byte* data() const { return region_->data() + range_.begin; }
  Region* region() const { return region_.get(); }
  Range range() const { return range_; }
  const std::vector<Range>& missing() const { return missing_; }
  bool complete() const { return missing_.empty(); }

  // Takes what has become free; the pieces, counted from data().
  std::vector<Range> take();

 private:
  const std::shared_ptr<Region> region_;
  const Range range_;
  std::vector<Range> missing_;  // in order
};

}  // namespace distorch
