// SPDX-License-Identifier: Apache-2.0
// Work cut into parts, for several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace distorch {

constexpr int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// work(part) for [0, parts), on up to `threads` threads, the caller's among
// them; whoever is free takes the next part. Threads wait asleep and end with
// the call: at::parallel_for would be serial here (its body is in headers and
// wants OpenMP), and OpenMP's threads, spinning between two calls, would take
// their cores from those that read the next weight. An exception ends it and is
// thrown again.
void for_parts(uint64_t parts, size_t threads, const std::function<void(uint64_t)>& work);

// work(begin, end) for [0, count), in parts of `per_part`.
template <class Work>
void for_ranges(int64_t count, int64_t per_part, size_t threads, const Work& work) {
  for_parts(divide_up(count, per_part), threads, [&](uint64_t part) {
    const auto begin = static_cast<int64_t>(part) * per_part;
    work(begin, std::min(begin + per_part, count));
  });
}

}  // namespace distorch
