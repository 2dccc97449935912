// SPDX-License-Identifier: Apache-2.0
#include "core/parts.h"

#include <atomic>
#include <latch>
#include <stdexcept>
#include <vector>

#include "core/error.h"
#include "tests/check.h"

using namespace distorch;

namespace {

void every_part_once() {
  for (const size_t threads : {1, 2, 5}) {
    for (const uint64_t parts : {0, 1, 3, 100}) {
      std::vector<std::atomic<int>> done(parts);
      for_parts(parts, threads, [&](uint64_t part) { ++done[part]; });
      for (const auto& count : done) CHECK(count == 1);
    }
  }
}

// Each part waits for the other: one thread alone would never end.
void threads_work_at_one_time() {
  std::latch all(2);
  for_parts(2, 2, [&](uint64_t) { all.arrive_and_wait(); });
  CHECK(all.try_wait());
}

void ranges_cover_all() {
  for (const int64_t count : {0, 1, 7, 64, 65}) {
    std::vector<std::atomic<int>> done(count);
    for_ranges(count, 8, 3, [&](int64_t begin, int64_t end) {
      CHECK(begin < end && end - begin <= 8);
      for (int64_t i = begin; i < end; ++i) ++done[i];
    });
    for (const auto& times : done) CHECK(times == 1);
  }
}

void errors_arrive() {
  CHECK_THROWS(kFetch, for_parts(50, 3, [&](uint64_t part) {
                 if (part >= 20) throw Error(ErrorKind::kFetch, "there is no more");
               }));
}

}  // namespace

int main() {
  every_part_once();
  threads_work_at_one_time();
  ranges_cover_all();
  errors_arrive();
}
