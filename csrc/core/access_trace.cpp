// SPDX-License-Identifier: Apache-2.0
#include "core/access_trace.h"

namespace distorch {
namespace {

constexpr size_t kCandidates = 16;    // places of one id worth comparing, the present included
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
  const auto newest = newest_.try_emplace(id, kNowhere).first;
  past_.push_back({id, newest->second});
  newest->second = end() - 1;
  if (past_.size() <= limit_) return;
  const auto oldest = newest_.find(past_.front().id);
  if (oldest->second == first_) newest_.erase(oldest);
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
  uint64_t place = past_.back().before;
  for (size_t i = 1; i < kCandidates && place != kNowhere && place >= first_; ++i) {
    const size_t agreed = agreement(place + 1);
    if (agreed > best) {
      best = agreed;
      cursor_ = place + 1;
      following_ = true;
    }
    place = past_[place - first_].before;
  }
}

std::optional<AccessTrace::Id> AccessTrace::predict(size_t k) const {
  const size_t span = period();
  if (span == 0) return std::nullopt;
  return at(cursor_ + k % span);
}

}  // namespace distorch
