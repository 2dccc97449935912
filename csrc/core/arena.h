// SPDX-License-Identifier: Apache-2.0
// Room for slots inside one allocation: a first-fit allocator of offsets that knows nothing of the
// memory it divides. Whoever shares one between threads guards it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

namespace distorch {

// Bytes [begin, end) of something.
struct Range {
  uint64_t begin, end;
};

class Arena {
 public:
  // `bytes` are rounded down to `granule`, and every request is rounded up: to one at least.
  Arena(uint64_t bytes, uint64_t granule);

  // The lowest offset with room, or nothing.
  std::optional<uint64_t> allocate(uint64_t bytes);
  // The highest offset with room such that a hole of `spare` bytes is left, or
  // nothing.
  std::optional<uint64_t> allocate_last(uint64_t bytes, uint64_t spare);
  // REQUIRES: `offset` came from an allocation of `bytes` and was not freed since.
  // Destructors call this, so it does not throw. If the process has no memory for one more hole,
  // the room counts as used as long as the arena lives.
  void free(uint64_t offset, uint64_t bytes) noexcept;

  // Takes whatever is free inside `wanted`, piece by piece, in order; each piece
  // is given back by itself. REQUIRES: `wanted` ends at multiples of the granule.
  std::vector<Range> take(Range wanted);
  std::vector<Range> holes() const;
  bool has_hole(uint64_t bytes) const;

  uint64_t capacity() const { return capacity_; }
  uint64_t used() const { return used_; }

 private:
  void move_begin(std::map<uint64_t, uint64_t>::iterator hole, uint64_t begin) noexcept;

  const uint64_t granule_;
  const uint64_t capacity_;
  std::map<uint64_t, uint64_t> holes_;  // offset -> bytes, never adjacent
  uint64_t used_ = 0;
};

}  // namespace distorch
