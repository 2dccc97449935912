// SPDX-License-Identifier: Apache-2.0
#include "core/access_trace.h"

namespace distorch {
namespace {

constexpr size_t kCandidates = 16;    // places of one id worth comparing
constexpr size_t kLongEnough = 4096;  // accesses that agree: look no further

}  // namespace

bool AccessTrace::record(Id id) {
  if (last_was(id)) return true;
  const bool expected = following_ && cursor_ < end() && at(cursor_) == id;
  append(id);
  if (expected) {
    ++cursor_;
  } else {
    resync();
  }
  return expected;
}

void AccessTrace::append(Id id) {
  std::deque<uint64_t>& places = positions_[id];
  places.push_back(end());
  if (places.size() > kCandidates) places.pop_front();
  past_.push_back(id);
  if (past_.size() <= limit_) return;
  auto oldest = positions_.find(past_.front());
  if (!oldest->second.empty() && oldest->second.front() == first_) oldest->second.pop_front();
  if (oldest->second.empty()) positions_.erase(oldest);
  past_.pop_front();
  ++first_;
  if (cursor_ < first_) following_ = false;
}

// How many accesses before `position` equal those before the present.
size_t AccessTrace::agreement(uint64_t position) const {
  size_t count = 0;
  while (count < kLongEnough && position - count > first_ &&
         at(position - count - 1) == at(end() - count - 1)) {
    ++count;
  }
  return count;
}

void AccessTrace::resync() {
  following_ = false;
  size_t best = 0;
  const std::deque<uint64_t>& places = positions_[past_.back()];
  for (auto place = places.rbegin(); place != places.rend(); ++place) {
    if (*place + 1 == end()) continue;  // the present itself
    const size_t agreed = agreement(*place + 1);
    if (agreed <= best) continue;
    best = agreed;
    cursor_ = *place + 1;
    following_ = true;
  }
}

std::optional<AccessTrace::Id> AccessTrace::predict(size_t k) const {
  const size_t span = period();
  if (span == 0) return std::nullopt;
  return at(cursor_ + k % span);
}

}  // namespace distorch
