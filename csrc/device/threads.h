// How many of torch's threads work of ours may take.
#pragma once

#include <ATen/Parallel.h>

#include <cstddef>

namespace distorch {

// One inside an operator that is parallel itself.
inline size_t compute_threads() {
  return at::in_parallel_region() ? 1 : static_cast<size_t>(at::get_num_threads());
}

}  // namespace distorch
