// SPDX-License-Identifier: Apache-2.0
#include "core/parts.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "core/mutex.h"

namespace distorch {

void for_parts(uint64_t parts, size_t threads, const std::function<void(uint64_t)>& work) {
  std::atomic<uint64_t> next{0};
  Mutex mutex;
  std::exception_ptr failure;  // guarded by mutex
  const auto take_parts = [&] {
    try {
      for (uint64_t part; (part = next++) < parts;) work(part);
    } catch (...) {
      next = parts;
      const MutexLock lock(mutex);
      failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (size_t i = 1; i < std::min<uint64_t>(threads, parts); ++i) {
      helpers.emplace_back(take_parts);
    }
    take_parts();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace distorch
