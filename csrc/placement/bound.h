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
// 3. Each run of operators, from the end of its first to the start of its last one. The bytes of
//    its weights were resident, were in the ring before the run, or came during the run. The links
//    need their time for those that came. All other operators take their time besides.
//
// Point 2 is about this ring. It fetches in the order of uses, and what was just used is the first
// to go. So each weight travels once in a step if twice the ring's bytes or more leave. (A few
// small ones are kept by chance: 0.1 % of a step in 1,000 random models, and 1 % where a slow link
// carries little else.) If less leaves, the ring may keep something, up to all of it where all of
// it fits. The bound counts on as many bytes as are missing to twice the ring: more than was kept
// in any of these steps.
Time step_bound(const PlacementProblem& problem);

}  // namespace distorch
