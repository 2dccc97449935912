// SPDX-License-Identifier: Apache-2.0
#include "device/threads.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorIterator.h>

#include <atomic>

namespace distorch {
namespace {

std::atomic<bool> are_gone{false};

}  // namespace

void compute_threads_are_gone() { are_gone = true; }

// at::parallel_for is in headers and would want OpenMP of our own; the loop of
// an iterator over one element per thread is compiled into torch and runs on
// torch's threads, whatever these are. Nothing here passes the dispatcher.
void for_parts_on_compute_threads(uint64_t parts, const std::function<void(uint64_t)>& work) {
  if (are_gone) return for_parts(parts, compute_threads(), work);
  const auto threads = static_cast<int64_t>(std::min<uint64_t>(compute_threads(), parts));
  std::atomic<uint64_t> next{0};
  const auto take_parts = [&] {
    try {
      for (uint64_t part; (part = next++) < parts;) work(part);
    } catch (...) {
      next = parts;
      throw;
    }
  };
  if (threads <= 1) return take_parts();
  const at::TensorBase places = at::detail::empty_cpu({threads}, at::TensorOptions(at::kChar));
  auto loop = at::TensorIteratorConfig()
                  .check_all_same_dtype(false)
                  .set_check_mem_overlap(false)
                  .resize_outputs(false)
                  .declare_static_shape(places.sizes())
                  .add_output(places)
                  .build();
  loop.for_each([&](char**, const int64_t*, int64_t, int64_t) { take_parts(); }, 1);
}

}  // namespace distorch
