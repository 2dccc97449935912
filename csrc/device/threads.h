// SPDX-License-Identifier: Apache-2.0
// How many of torch's threads work of ours may take, and how to have them do it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "core/parts.h"

namespace distorch {

// One inside an operator that is parallel itself.
inline size_t compute_threads() {
  return at::in_parallel_region() ? 1 : static_cast<size_t>(at::get_num_threads());
}

// work(part) for [0, parts) on the threads of torch's own operators, the
// caller's among them; whoever is free takes the next part. Unlike for_parts(),
// for work between two operators of the same thread: their threads are awake
// then. An exception ends it and is thrown again.
void for_parts_on_compute_threads(uint64_t parts, const std::function<void(uint64_t)>& work);

// Torch's threads do not survive a fork of the process, and who waits for them
// waits for ever: from now on threads of our own do the work.
void compute_threads_are_gone();

// Rows of a part of a matrix: whole steps of rows, some 2 MB, and as many parts
// for one thread as for another. For products factors are packed for each part.
inline int64_t rows_per_part(int64_t rows, int64_t row_bytes, int64_t step, int64_t threads) {
  constexpr int64_t kMostBytes = 2 << 20;
  constexpr int64_t kPartsPerThread = 2;  // at least
  const int64_t each = std::max(kPartsPerThread, divide_up(rows * row_bytes, threads * kMostBytes));
  return divide_up(divide_up(std::max<int64_t>(rows, 1), threads * each), step) * step;
}

}  // namespace distorch
