#include "core/arena.h"

#include <algorithm>
#include <iterator>

namespace distorch {
namespace {

uint64_t round_up_to(uint64_t bytes, uint64_t granule) {
  return (std::max<uint64_t>(bytes, 1) + granule - 1) / granule * granule;
}

}  // namespace

Arena::Arena(uint64_t bytes, uint64_t granule)
    : granule_(granule), capacity_(bytes / granule * granule) {
  if (capacity_ > 0) holes_.emplace(0, capacity_);
}

std::optional<uint64_t> Arena::allocate(uint64_t bytes) {
  const uint64_t need = round_up_to(bytes, granule_);
  std::lock_guard lock(mutex_);
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    const auto [offset, room] = *hole;
    if (room < need) continue;
    holes_.erase(hole);
    if (room > need) holes_.emplace(offset + need, room - need);
    used_ += need;
    return offset;
  }
  return std::nullopt;
}

void Arena::free(uint64_t offset, uint64_t bytes) {
  uint64_t room = round_up_to(bytes, granule_);
  std::lock_guard lock(mutex_);
  used_ -= room;
  auto next = holes_.lower_bound(offset);
  if (next != holes_.end() && offset + room == next->first) {
    room += next->second;
    next = holes_.erase(next);
  }
  if (next != holes_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += room;
      return;
    }
  }
  holes_.emplace(offset, room);
}

uint64_t Arena::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace distorch
