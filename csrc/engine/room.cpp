// SPDX-License-Identifier: Apache-2.0
#include "engine/room.h"

#include <utility>

namespace distorch {

std::shared_ptr<Room> Room::taken(std::shared_ptr<Region> region, Range range) {
  auto room = std::make_shared<Room>(std::move(region), range);
  room->missing_.clear();
  return room;
}

// Free is what lies between the missing pieces.
Room::~Room() {
  const auto free = [this](uint64_t begin, uint64_t end) {
    if (end > begin) region_->arena()->free(begin, end - begin);
  };
  uint64_t begin = range_.begin;
  for (const Range& piece : missing_) {
    free(begin, piece.begin);
    begin = piece.end;
  }
  free(begin, range_.end);
}

std::vector<Range> Room::take() {
  std::vector<Range> found, still;
  for (const Range& piece : missing_) {
    uint64_t begin = piece.begin;
    for (const Range& got : region_->arena()->take(piece)) {
      if (got.begin > begin) still.push_back({begin, got.begin});
      found.push_back({got.begin - range_.begin, got.end - range_.begin});
      begin = got.end;
    }
    if (begin < piece.end) still.push_back({begin, piece.end});
  }
  missing_ = std::move(still);
  return found;
}

}  // namespace distorch
