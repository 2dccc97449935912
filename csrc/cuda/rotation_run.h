// SPDX-License-Identifier: Apache-2.0
// What one thread of the kernel that turns weights back does; compiles for hosts too.
#pragma once

#include <cstdint>

#include "core/rotation.h"

namespace distorch::cuda {

constexpr int kQuadThreads = 256;  // of a block, at least; a large group takes more

// Groups that a block of threads turns, a quad at a time for each thread.
DISTORCH_HD int groups_at_once(int64_t group) {
  const int64_t quads = group / 4;
  return quads < kQuadThreads ? static_cast<int>(kQuadThreads / quads) : 1;
}

// The thread's quad in the stage of quads `apart` apart, of numbers that a block holds together.
DISTORCH_HD void turn_stage(float* numbers, int thread, int apart) {
  float* first = numbers + thread / apart * (4 * apart) + thread % apart;
  turn_quad(first[0], first[apart], first[2 * apart], first[3 * apart]);
}

}  // namespace distorch::cuda
