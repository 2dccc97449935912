// SPDX-License-Identifier: Apache-2.0
#include "core/layout.h"

#include <algorithm>
#include <tuple>

namespace distorch {
namespace {

// What a room costs, the most important first.
using Cost = std::tuple<uint64_t, double, uint64_t, uint64_t>;

// A room that is complete later than the best one until now (`latest_allowed`) is not looked at any
// further.
Cost cost_of(const std::vector<Occupied>& taken, uint64_t capacity, uint64_t begin, uint64_t bytes,
             uint64_t latest_allowed) {
  const uint64_t end = begin + bytes;
  uint64_t complete_after = 0;
  double waiting = 0;  // bytes x uses
  for (const Occupied& other : taken) {
    const uint64_t from = std::max(begin, other.range.begin);
    const uint64_t to = std::min(end, other.range.end);
    if (from >= to) continue;
    complete_after = std::max(complete_after, other.free_after);
    if (complete_after > latest_allowed) return {kNotKnown, 0, 0, 0};
    waiting += static_cast<double>(to - from) * static_cast<double>(other.free_after);
  }
  return {complete_after, waiting, std::min(begin, capacity - end), begin};
}

}  // namespace

std::optional<uint64_t> choose_offset(const std::vector<Occupied>& taken, uint64_t capacity,
                                      uint64_t bytes) {
  if (bytes > capacity) return std::nullopt;
  Cost best{kNotKnown, 0, 0, 0};
  const auto consider = [&](uint64_t begin) {
    if (begin > capacity - bytes) return;
    best = std::min(best, cost_of(taken, capacity, begin, bytes, std::get<0>(best)));
  };
  consider(0);
  consider(capacity - bytes);
  for (const Occupied& other : taken) {
    consider(other.range.end);
    if (other.range.begin >= bytes) consider(other.range.begin - bytes);
  }
  if (std::get<0>(best) == kNotKnown) return std::nullopt;
  return std::get<3>(best);
}

}  // namespace distorch
