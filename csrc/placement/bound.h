// SPDX-License-Identifier: Apache-2.0
// What no placement can beat.
#pragma once

#include "placement/problem.h"

namespace distorch {

// Note [A lower bound]
// No placement within the capacities makes a step faster than the largest of these.
// 1. The operators, one after the other.
// 2. The links. What does not fit on the compute device has to travel in each step. (If it fits
//    into the ring all together, it stays there, and nothing travels.) A link carries its rate, a
//    tier cannot send more than lies there, and weights are whole: a device takes no more than the
//    largest sum of their sizes that fits.
// 3. A run of operators, for all runs. All bytes of its weights that are not resident come while it
//    lasts, but for what the ring had before. So the run lasts at least as long as that takes over
//    all links, even if all resident weights are in this run; and the other operators come on top.
//
// Point 2 is about this ring. It fetches in the order of uses, and what was just used is the first
// to go. So each weight travels once in a step if twice the ring's bytes or more leave. (In
// measured steps a few small ones are kept by chance, which makes up to 1 % of a step.) If less
// leaves, the ring may keep something, up to all of it where all of it fits. The bound counts on as
// many bytes as are missing to twice the ring: more than was kept in some thousand random steps.
Time step_bound(const PlacementProblem& problem);

}  // namespace distorch
