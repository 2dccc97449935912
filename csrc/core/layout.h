// SPDX-License-Identifier: Apache-2.0
// Where in a ring the next weight goes. Numbers only: no devices, no memory.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "core/arena.h"

namespace distorch {

// Bytes that are taken, and how many uses from now will have set them free.
struct Occupied {
  Range range;
  uint64_t free_after;
};

// Instead of a number of uses: nobody knows it.
inline constexpr uint64_t kNotKnown = std::numeric_limits<uint64_t>::max();

// Note [Rooms that become free by and by]
// A weight needs its bytes in one piece, and what is free seldom is. With a
// ring of the two largest weights a U-Net waited up to 20 % of a step for room
// that was there, in two pieces. So a weight is given its room early, over
// slots that will be free before it is used, and its bytes are copied part by
// part, each behind the operator that used that part before. Two weights may
// wait like that at once: what the first one leaves unused meanwhile is the
// second one's.
//
// The room taken is the one that is free first; of these, the one whose bytes
// wait least; of these, the one nearest to an end of the ring, which keeps what
// is left in one piece. Looking further ahead (a search over the next weights)
// was not better than the second weight in waiting.
//
// Entries of `taken` may overlap. Nothing: every room has bytes of kNotKnown.
std::optional<uint64_t> choose_offset(const std::vector<Occupied>& taken, uint64_t capacity,
                                      uint64_t bytes);

}  // namespace distorch
