// SPDX-License-Identifier: Apache-2.0
// An Arena against a list of what was handed out.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>
#include <optional>
#include <vector>

#include "core/arena.h"
#include "tests/check.h"

using distorch::Arena;

// While it is set, the process has no memory.
static bool starved = false;

void* operator new(std::size_t bytes) {
  if (starved) throw std::bad_alloc();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

// Ten rooms of 64 bytes are given back in any order. Only room between two others needs a new
// entry, and that room is lost.
void rooms_are_given_back_without_memory() {
  Arena arena(640, 64);
  for (int i = 0; i < 10; ++i) CHECK(*arena.allocate(64) == static_cast<uint64_t>(i) * 64);
  arena.free(3 * 64, 64);
  starved = true;
  arena.free(4 * 64, 64);  // behind a hole
  arena.free(2 * 64, 64);  // before one
  arena.free(7 * 64, 64);  // between rooms
  CHECK(arena.allocate(64) == 2 * 64);
  starved = false;
  CHECK(arena.used() == 8 * 64);
  for (const int i : {0, 1, 2, 5, 6, 8, 9}) arena.free(static_cast<uint64_t>(i) * 64, 64);
  CHECK(arena.used() == 64);
  const auto holes = arena.holes();
  CHECK(holes.size() == 2 && holes[0].end == 7 * 64 && holes[1].begin == 8 * 64);
}

void whole_and_back() {
  Arena arena(1000, 64);  // 15 granules and a rest that is of no use
  const uint64_t capacity = arena.capacity();
  CHECK(capacity % 64 == 0);
  CHECK(*arena.allocate(capacity) == 0);
  CHECK(!arena.allocate(1).has_value());
  arena.free(0, capacity);
  CHECK(arena.used() == 0);
  CHECK(*arena.allocate(capacity) == 0);
}

void holes_are_joined() {
  Arena arena(640, 64);
  std::vector<uint64_t> offsets;
  for (int i = 0; i < 10; ++i) offsets.push_back(*arena.allocate(64));
  for (const int i : {3, 5, 4}) arena.free(offsets[i], 64);
  CHECK(*arena.allocate(3 * 64) == offsets[3]);
}

// The highest offset that leaves a hole of `spare`, by looking at every one.
std::optional<uint64_t> last_offset(const Arena& arena, uint64_t bytes, uint64_t spare) {
  const uint64_t need = (bytes + 4095) / 4096 * 4096;
  const auto holes = arena.holes();
  for (auto hole = holes.rbegin(); hole != holes.rend(); ++hole) {
    for (uint64_t at = hole->end; at >= hole->begin + need; at -= 4096) {
      const uint64_t offset = at - need;
      bool left = std::max(offset - hole->begin, hole->end - at) >= spare;
      for (auto other = holes.rbegin(); other != holes.rend(); ++other) {
        left = left || (other != hole && other->end - other->begin >= spare);
      }
      if (left) return offset;
    }
  }
  return std::nullopt;
}

void random_requests() {
  std::mt19937_64 random(2);
  Arena arena(1 << 20, 4096);
  std::map<uint64_t, uint64_t> live;
  uint64_t refused = 0;
  for (int i = 0; i < 50000; ++i) {
    if (live.empty() || random() % 2 == 0) {
      const uint64_t bytes = 1 + random() % 50000;
      const uint64_t spare = random() % 200000;
      const bool last = random() % 4 == 0;
      const auto expected = last ? last_offset(arena, bytes, spare) : std::nullopt;
      const auto offset = last ? arena.allocate_last(bytes, spare) : arena.allocate(bytes);
      CHECK(!last || offset == expected);
      if (!offset) {
        ++refused;
        continue;
      }
      CHECK(*offset % 4096 == 0);
      CHECK(*offset + bytes <= arena.capacity());
      const auto after = live.lower_bound(*offset);
      CHECK(after == live.end() || *offset + bytes <= after->first);
      CHECK(after == live.begin() || std::prev(after)->first + std::prev(after)->second <= *offset);
      live.emplace(*offset, bytes);
    } else {
      auto entry = live.begin();
      std::advance(entry, random() % live.size());
      arena.free(entry->first, entry->second);
      live.erase(entry);
    }
  }
  CHECK(refused > 0);
  for (const auto& [offset, bytes] : live) arena.free(offset, bytes);
  CHECK(arena.used() == 0);
  CHECK(*arena.allocate(arena.capacity()) == 0);
}

}  // namespace

int main() {
  whole_and_back();
  holes_are_joined();
  rooms_are_given_back_without_memory();
  random_requests();
}
