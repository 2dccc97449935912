#include "core/bulk_read.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/file.h"

namespace distorch {
namespace {

constexpr uint64_t kPartBytes = 4 << 20;

}  // namespace

void bulk_read(const File& file, uint64_t offset, uint64_t bytes, std::byte* into, size_t threads) {
  const uint64_t parts = (bytes + kPartBytes - 1) / kPartBytes;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;  // guarded by mutex
  const auto work = [&] {
    try {
      for (uint64_t part; (part = next++) < parts;) {
        const uint64_t begin = part * kPartBytes;
        const uint64_t length = std::min(kPartBytes, bytes - begin);
        file.read(offset + begin, length, into + begin, false);
      }
    } catch (...) {
      next = parts;
      std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  };
  std::vector<std::jthread> helpers;
  for (size_t i = 1; i < std::min<uint64_t>(threads, parts); ++i) helpers.emplace_back(work);
  work();
  helpers.clear();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace distorch
