// SPDX-License-Identifier: Apache-2.0
#include "sim/ledger.h"

#include <algorithm>

namespace distorch::sim {
namespace {

constexpr size_t kMostRaces = 100;

bool knows(const VectorClock& clock, size_t stream, uint64_t tick) {
  return stream < clock.size() && clock[stream] >= tick;
}

}  // namespace

void merge(VectorClock& into, const VectorClock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Ledger::split(uintptr_t at) {
  auto after = ranges_.upper_bound(at);
  if (after == ranges_.begin()) return;
  auto range = std::prev(after);
  if (range->first == at || range->second.end <= at) return;
  Range tail = range->second;
  range->second.end = at;
  ranges_.emplace_hint(after, at, std::move(tail));
}

void Ledger::check(const Past& past, const char* did, const Access& access, size_t stream,
                   const VectorClock& clock, const std::string& label) {
  if (past.tick == 0 || past.stream == stream || knows(clock, past.stream, past.tick)) return;
  if (races_.size() >= kMostRaces) return;
  std::string race = "'" + label + "' on stream " + std::to_string(stream) +
                     (access.writes ? " writes" : " reads") + " bytes that '" + past.label +
                     "' on stream " + std::to_string(past.stream) + " " + did +
                     " without an event that orders them";
  // One access meets the other once for every range that the bytes were ever split into. Said again
  // for each, one race could fill the list, and hide the others.
  if (std::find(races_.begin(), races_.end(), race) == races_.end()) {
    races_.push_back(std::move(race));
  }
}

void Ledger::access(const Access& access, size_t stream, const VectorClock& clock,
                    const std::string& label) {
  if (access.begin >= access.end) return;
  split(access.begin);
  split(access.end);
  const Past now{stream, clock[stream], label};
  uintptr_t at = access.begin;
  auto range = ranges_.lower_bound(at);
  while (at < access.end) {
    if (range == ranges_.end() || range->first > at) {  // bytes that nobody touched yet
      const uintptr_t end =
          range == ranges_.end() ? access.end : std::min(access.end, range->first);
      range = ranges_.emplace_hint(range, at, Range{end, {}, {}});
    }
    Range& bytes = range->second;
    check(bytes.written, "writes", access, stream, clock, label);
    if (access.writes) {
      for (const Past& reader : bytes.read) check(reader, "reads", access, stream, clock, label);
      bytes.written = now;
      bytes.read.clear();
    } else {
      const auto same = [&](const Past& past) { return past.stream == stream; };
      const auto known = std::find_if(bytes.read.begin(), bytes.read.end(), same);
      if (known == bytes.read.end()) {
        bytes.read.push_back(now);
      } else {
        *known = now;
      }
    }
    at = bytes.end;
    ++range;
  }
}

void Ledger::forget(uintptr_t begin, uintptr_t end) {
  split(begin);
  split(end);
  ranges_.erase(ranges_.lower_bound(begin), ranges_.lower_bound(end));
}

}  // namespace distorch::sim
