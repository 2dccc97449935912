// SPDX-License-Identifier: Apache-2.0
// Rooms are chosen where they are free first, and taken part by part.
#include <vector>

#include "core/layout.h"
#include "engine/room.h"
#include "tests/check.h"

using namespace distorch;

namespace {

void a_hole_before_anything_else() {
  const std::vector<Occupied> taken{{{0, 30}, 1}, {{60, 100}, 2}};
  CHECK(*choose_offset(taken, 100, 30) == 30);
  CHECK(*choose_offset(taken, 100, 31) == 29);  // all but a byte at once, that one after a use
  CHECK(!choose_offset(taken, 100, 101).has_value());
}

void an_end_keeps_what_is_left_in_one_piece() {
  CHECK(*choose_offset({}, 100, 30) == 0);
  CHECK(*choose_offset({{{0, 10}, kNotKnown}}, 100, 30) == 70);
}

void never_over_what_nobody_knows() {
  const std::vector<Occupied> taken{{{40, 60}, kNotKnown}, {{0, 40}, 7}};
  CHECK(*choose_offset(taken, 100, 40) == 60);
  CHECK(!choose_offset(taken, 100, 41).has_value());
}

// Against every multiple of the granule: no room is complete sooner.
void no_room_is_complete_sooner() {
  std::mt19937_64 random(3);
  for (int i = 0; i < 2000; ++i) {
    const uint64_t capacity = 1 + random() % 60, bytes = 1 + random() % 60;
    std::vector<Occupied> taken;
    for (uint64_t at = random() % 9; at < capacity;) {
      const uint64_t end = std::min(capacity, at + 1 + random() % 20);
      taken.push_back({{at, end}, random() % 6 == 0 ? kNotKnown : 1 + random() % 9});
      at = end + random() % 9;
    }
    const auto complete_after = [&](uint64_t begin) {
      uint64_t after = 0;
      for (const auto& [range, free_after] : taken) {
        if (range.begin < begin + bytes && begin < range.end) after = std::max(after, free_after);
      }
      return after;
    };
    uint64_t best = kNotKnown;
    for (uint64_t at = 0; at + bytes <= capacity; ++at) best = std::min(best, complete_after(at));
    const auto chosen = choose_offset(taken, capacity, bytes);
    CHECK(chosen.has_value() == (best != kNotKnown));
    if (!chosen) continue;
    CHECK(*chosen + bytes <= capacity && complete_after(*chosen) == best);
  }
}

void a_room_is_taken_as_it_becomes_free() {
  auto region = std::make_shared<Region>(nullptr, 10 * 64, 64);
  auto first = Room::taken(region, {*region->arena()->allocate(3 * 64), 3 * 64});
  const auto second = Room::taken(region, {*region->arena()->allocate(2 * 64), 5 * 64});
  {
    Room room(region, {64, 8 * 64});  // over a part of the first, and all of the second
    auto parts = room.take();
    CHECK(parts.size() == 1 && parts[0].begin == 4 * 64 && parts[0].end == 7 * 64);
    CHECK(room.take().empty() && !room.complete());
    first.reset();
    parts = room.take();
    CHECK(parts.size() == 1 && parts[0].begin == 0 && parts[0].end == 2 * 64);
    CHECK(room.missing().size() == 1 && region->arena()->used() == 7 * 64);
  }
  CHECK(region->arena()->used() == 2 * 64);  // what was taken went back, the second one's did not
  CHECK(region->arena()->holes().size() == 2);
}

}  // namespace

int main() {
  a_hole_before_anything_else();
  an_end_keeps_what_is_left_in_one_piece();
  never_over_what_nobody_knows();
  no_room_is_complete_sooner();
  a_room_is_taken_as_it_becomes_free();
}
