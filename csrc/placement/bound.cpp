// SPDX-License-Identifier: Apache-2.0
#include "placement/bound.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace distorch {
namespace {

constexpr int kHalvingsOfTime = 60;
constexpr size_t kPoints = 256;  // of a table of times
constexpr size_t kMostStarts = 1500;
// If so many times the ring's bytes leave, the ring keeps none from one step to the next. If less
// leaves, it keeps no more than what is missing to that.
constexpr double kCirculates = 2;
// Words of a bit set that are touched to find all sums of sizes. More is not worth the time: many
// different sizes have sums close to everything.
constexpr uint64_t kMostWords = 4'000'000;

// The largest sum of sizes that is no more than a limit.
class Sums {
 public:
  explicit Sums(const PlacementProblem& problem) {
    uint64_t total = 0;
    for (const PlacementProblem::Weight& weight : problem.weights) {
      unit_ = std::gcd(unit_, weight.bytes);
      total += weight.bytes;
    }
    if (unit_ == 0) return;
    const uint64_t words = total / unit_ / 64 + 1;
    if (words > kMostWords / std::max<size_t>(problem.weights.size(), 1)) return;
    reachable_.assign(words, 0);
    reachable_[0] = 1;
    for (const PlacementProblem::Weight& weight : problem.weights) shift_in(weight.bytes / unit_);
  }

  double within(double limit) const {
    if (unit_ == 0 || limit <= 0) return 0;
    if (limit >= kUnlimited) return limit;
    uint64_t units = static_cast<uint64_t>(limit / static_cast<double>(unit_));
    if (!reachable_.empty()) {
      units = std::min<uint64_t>(units, reachable_.size() * 64 - 1);
      while ((reachable_[units / 64] >> units % 64 & 1) == 0) --units;  // 0 is always there
    }
    return static_cast<double>(units * unit_);
  }

 private:
  static constexpr double kUnlimited = 1e18;

  // Each sum, and that sum with one more weight.
  void shift_in(uint64_t by) {
    const uint64_t words = by / 64, bits = by % 64;
    for (size_t i = reachable_.size(); i-- > words;) {
      uint64_t moved = reachable_[i - words] << bits;
      if (bits > 0 && i > words) moved |= reachable_[i - words - 1] >> (64 - bits);
      reachable_[i] |= moved;
    }
  }

  uint64_t unit_ = 0;                // divides all sizes
  std::vector<uint64_t> reachable_;  // by units; empty: not known
};

class Bound {
 public:
  explicit Bound(const PlacementProblem& problem) : problem_(problem), sums_(problem) {}

  Time step() const;

 private:
  double carried_in(Time seconds, bool whole) const;
  Time seconds_for(double bytes, bool whole) const;
  Time of_runs(double resident, double ring) const;

  const PlacementProblem& problem_;
  const Sums sums_;
};

Time Bound::step() const {
  const Time computing = problem_.compute_seconds();
  double travelling = 0, largest = 0;
  bool whole = true;  // no weight travels in part
  std::vector<bool> used(problem_.weights.size());
  for (const PlacementProblem::Use& use : problem_.uses) {
    double together = 0;
    for (const uint32_t index : use.weights) {
      const auto bytes = static_cast<double>(problem_.weights[index].travels);
      together += bytes;
      if (!used[index]) travelling += bytes;
      used[index] = true;
      whole = whole && problem_.weights[index].travels == problem_.weights[index].bytes;
    }
    largest = std::max(largest, together);
  }
  // An operator's weights are all there at once, if need be outside of the ring.
  const double ring = std::max(static_cast<double>(problem_.ring_bytes), largest);
  const double resident = sums_.within(static_cast<double>(problem_.tiers[0].capacity));
  const double leaving = travelling - resident;
  if (leaving <= ring) return computing;
  const double kept = std::max(0.0, kCirculates * ring - leaving);
  const Time links = seconds_for(leaving - kept, whole && kept == 0);
  return std::max({computing, links, of_runs(resident, ring)});
}

// No more bytes than these travel in so many seconds. `whole`: they are whole weights, as those of
// a step are. Of a run, a part of a weight may have come before.
double Bound::carried_in(Time seconds, bool whole) const {
  const size_t tiers = problem_.tiers.size();
  std::vector<double> alone(tiers);  // what each tier would send if it were the only one
  double all = 0;
  for (size_t tier = 1; tier < tiers; ++tier) {
    double most = static_cast<double>(problem_.tiers[tier].capacity);
    for (const PlacementProblem::Route& route : problem_.tiers[tier].routes) {
      most = std::min(most, problem_.links[route.link].rate * seconds / route.share);
    }
    alone[tier] = whole ? sums_.within(most) : most;
    all += alone[tier];
  }
  double found = all;
  for (uint32_t link = 0; link < problem_.links.size(); ++link) {
    double over_it = 0, least_share = 1;
    for (size_t tier = 1; tier < tiers; ++tier) {
      for (const PlacementProblem::Route& route : problem_.tiers[tier].routes) {
        if (route.link != link) continue;
        over_it += alone[tier];
        least_share = std::min(least_share, route.share);
      }
    }
    const double most = problem_.links[link].rate * seconds / least_share;
    found = std::min(found, all - over_it + std::min(over_it, most));
  }
  return problem_.together > 0 ? std::min(found, problem_.together * seconds) : found;
}

Time Bound::seconds_for(double bytes, bool whole) const {
  if (bytes <= 0) return 0;
  double slowest = kNever;
  for (const PlacementProblem::Link& link : problem_.links) slowest = std::min(slowest, link.rate);
  Time low = 0, high = bytes / slowest * 2;
  if (carried_in(high, whole) < bytes) return 0;  // it does not fit anywhere: nothing is said
  for (int i = 0; i < kHalvingsOfTime; ++i) {
    const Time middle = (low + high) / 2;
    (carried_in(middle, whole) < bytes ? low : high) = middle;
  }
  return low;
}

// See point 3 of the note. `resident`: bytes that may all be in one run.
Time Bound::of_runs(double resident, double ring) const {
  const size_t uses = problem_.uses.size();
  // Of two steps in a row, until the start of each use: bytes that are used for the first time in
  // their step, and seconds.
  std::vector<double> bytes(2 * uses + 1);
  std::vector<Time> seconds(2 * uses + 1);
  for (size_t round = 0; round < 2; ++round) {
    std::vector<bool> seen(problem_.weights.size());
    for (size_t i = 0; i < uses; ++i) {
      const size_t at = round * uses + i;
      bytes[at + 1] = bytes[at];
      seconds[at + 1] = seconds[at] + problem_.uses[i].seconds;
      for (const uint32_t index : problem_.uses[i].weights) {
        if (!seen[index]) bytes[at + 1] += static_cast<double>(problem_.weights[index].travels);
        seen[index] = true;
      }
    }
  }
  const double most = bytes[uses] - resident - ring;
  if (most <= 0 || uses < 2) return 0;
  // A table, since there are many runs. It is read at the point before.
  std::array<Time, kPoints + 1> table;
  for (size_t i = 0; i <= kPoints; ++i) {
    table[i] = seconds_for(most * static_cast<double>(i) / kPoints, /*whole=*/false);
  }
  Time found = 0;
  const size_t stride = uses / kMostStarts + 1;
  for (size_t first = 0; first < uses; first += stride) {
    // From the end of the first operator to the start of the last one.
    for (size_t last = first + 1; last < first + uses; ++last) {
      const double come = bytes[last + 1] - bytes[first] - resident - ring;
      if (come <= 0) continue;
      const Time inside = seconds[last] - seconds[first + 1];
      const auto point = static_cast<size_t>(come / most * kPoints);
      found = std::max(found, seconds[uses] - inside + table[std::min(point, kPoints)]);
    }
  }
  return found;
}

}  // namespace

Time step_bound(const PlacementProblem& problem) { return Bound(problem).step(); }

}  // namespace distorch
