// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "core/alignment.h"

namespace distorch {

Arena::Arena(uint64_t bytes, uint64_t granule)
    : granule_(granule), capacity_(round_down(bytes, granule)) {
  if (capacity_ > 0) holes_.emplace(0, capacity_);
}

std::optional<uint64_t> Arena::allocate(uint64_t bytes) {
  const uint64_t need = round_up_room(bytes, granule_);
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    const auto [offset, room] = *hole;
    if (room < need) continue;
    if (room > need) {
      move_begin(hole, offset + need);
    } else {
      holes_.erase(hole);
    }
    used_ += need;
    return offset;
  }
  return std::nullopt;
}

// The hole ends where it did. This takes no memory: the entry is used again.
void Arena::move_begin(std::map<uint64_t, uint64_t>::iterator hole, uint64_t begin) noexcept {
  auto entry = holes_.extract(hole);
  entry.mapped() = entry.key() + entry.mapped() - begin;
  entry.key() = begin;
  holes_.insert(std::move(entry));
}

std::optional<uint64_t> Arena::allocate_last(uint64_t bytes, uint64_t spare) {
  const uint64_t need = round_up_room(bytes, granule_);
  const auto large = std::count_if(holes_.begin(), holes_.end(),
                                   [&](const auto& hole) { return hole.second >= spare; });
  for (auto hole = holes_.end(); hole != holes_.begin();) {
    --hole;
    const auto [offset, room] = *hole;
    if (room < need) continue;
    const bool spares = room - need >= spare || large > (room >= spare ? 1 : 0);
    if (!spares) continue;
    if (room > need) {
      hole->second = room - need;
    } else {
      holes_.erase(hole);
    }
    used_ += need;
    return offset + room - need;
  }
  return std::nullopt;
}

void Arena::free(uint64_t offset, uint64_t bytes) noexcept {
  const uint64_t room = round_up_room(bytes, granule_);
  const auto next = holes_.lower_bound(offset);
  const bool joins_next = next != holes_.end() && offset + room == next->first;
  const auto previous = next == holes_.begin() ? holes_.end() : std::prev(next);
  if (previous != holes_.end() && previous->first + previous->second == offset) {
    previous->second += room;
    if (joins_next) {
      previous->second += next->second;
      holes_.erase(next);
    }
  } else if (joins_next) {
    move_begin(next, offset);
  } else {
    try {
      holes_.emplace_hint(next, offset, room);
    } catch (const std::bad_alloc&) {
      return;  // it stays in use
    }
  }
  used_ -= room;
}

std::vector<Range> Arena::take(Range wanted) {
  std::vector<Range> taken;
  auto hole = holes_.upper_bound(wanted.begin);
  if (hole != holes_.begin()) --hole;
  while (hole != holes_.end() && hole->first < wanted.end) {
    const Range whole{hole->first, hole->first + hole->second};
    const Range part{std::max(whole.begin, wanted.begin), std::min(whole.end, wanted.end)};
    if (part.begin >= part.end) {
      ++hole;
      continue;
    }
    taken.push_back(part);  // what may find no memory comes first
    if (part.end < whole.end) holes_.emplace_hint(std::next(hole), part.end, whole.end - part.end);
    if (whole.begin < part.begin) {
      hole->second = part.begin - whole.begin;
      ++hole;
    } else {
      hole = holes_.erase(hole);
    }
    used_ += part.end - part.begin;
  }
  return taken;
}

std::vector<Range> Arena::holes() const {
  std::vector<Range> found;
  for (const auto& [offset, room] : holes_) found.push_back({offset, offset + room});
  return found;
}

bool Arena::has_hole(uint64_t bytes) const {
  return std::any_of(holes_.begin(), holes_.end(),
                     [&](const auto& hole) { return hole.second >= bytes; });
}

}  // namespace distorch
