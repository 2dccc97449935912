// SPDX-License-Identifier: Apache-2.0
// Placements with which a step is short.
#pragma once

#include <vector>

#include "placement/problem.h"

namespace distorch {

// Note [Finding a placement]
// There are far too many placements to look at. Two things together come close to the bound.
// 1. Spreading over time. Each donor is owed bytes while operators run, in proportion to what it
//    shall send in a step. A weight goes to the donor that is owed most, if that is at least half
//    of the weight, and stays resident otherwise. So weights leave where the links have time for
//    them, and stay where many bytes meet little computation. What a donor is owed does not pile up
//    beyond a part of the ring: nothing could be fetched so far ahead.
// 2. Small changes, of which those stay that make the step no longer (placement/flow.h): a weight
//    that operators wait for, or one shortly before it, changes places with another one, or moves
//    to where there is room.
// Both are done from several beginnings. There is no chance in it: the same problem gives the same
// placements. The work is bounded by the number of uses, so large models get fewer changes. If a
// model is so small that all placements can be looked at, they are.

// Placements within the capacities, the one with the shortest step first, each one once, and no
// more than `most`. `start` is such a placement. REQUIRES: problem.tiers.size() <= 32.
std::vector<Placement> find_placements(const PlacementProblem& problem, const Placement& start,
                                       size_t most);

}  // namespace distorch
