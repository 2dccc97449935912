// SPDX-License-Identifier: Apache-2.0
#include "placement/flow.h"

#include <algorithm>

namespace distorch {
namespace {

// Steps that are played: the first ones settle, the last ones count.
constexpr int kSettling = 2, kCounted = 2;
constexpr double kByte = 1;  // less than this of a fetch is rounding

}  // namespace

Flow::Flow(const PlacementProblem& problem)
    : problem_(problem),
      ring_bytes_(static_cast<double>(problem.ring_bytes)),
      stalls_(problem.weights.size()) {
  for (const PlacementProblem::Use& use : problem.uses) {
    for (const uint32_t weight : use.weights) visits_.push_back({weight, 0});
    // An operator without weights makes the one before it longer.
    (visits_.empty() ? before_ : visits_.back().seconds) += use.seconds;
  }
}

Time Flow::step(const Placement& placement) {
  constexpr double kNeverFetched = -1;
  fetched_.assign(1, 0.0);
  released_.assign(1, 0.0);
  given_back_ = 0;
  room_from_ = 0;
  free_from_.assign(problem_.links.size(), 0.0);
  last_fetched_.assign(problem_.weights.size(), kNeverFetched);
  std::fill(stalls_.begin(), stalls_.end(), 0.0);
  Time now = 0, start = 0;
  for (int round = 0; round < kSettling + kCounted; ++round) {
    if (round == kSettling) start = now;
    now += before_;
    for (const Visit& visit : visits_) {
      const PlacementProblem::Weight& weight = problem_.weights[visit.weight];
      const PlacementProblem::Tier& tier = problem_.tiers[placement[visit.weight]];
      if (tier.routes.empty() || weight.travels == 0) {
        now += visit.seconds;
        continue;
      }
      const auto bytes = static_cast<double>(weight.travels);
      double& last = last_fetched_[visit.weight];
      const bool held = last != kNeverFetched && fetched_.back() - last + bytes <= ring_bytes_;
      if (!held) {
        const Time arrived = arrival(tier, bytes);
        if (arrived > now) {
          if (round >= kSettling) stalls_[visit.weight] += (arrived - now) / kCounted;
          now = arrived;
        }
        last = fetched_.back() + bytes;
      }
      now += visit.seconds;
      if (!held) {
        fetched_.push_back(last);
        released_.push_back(now);
      }
    }
  }
  return (now - start) / kCounted;
}

// When the last byte of the next fetch is there.
Time Flow::arrival(const PlacementProblem::Tier& tier, double bytes) {
  const double begin = fetched_.back(), end = begin + bytes;
  Time whole = 0;
  const size_t given_back = given_back_;
  const Time room_from = room_from_;
  for (const PlacementProblem::Route& route : tier.routes) {
    const PlacementProblem::Link& link = problem_.links[route.link];
    given_back_ = given_back;  // each link waits for the same rooms
    room_from_ = room_from;
    double position = begin;
    Time time = free_from_[route.link];
    Time latency = link.latency;
    while (end - position > kByte) {
      // What was fetched last has been used already: a fetch has room at the latest then.
      while (fetched_[given_back_] + ring_bytes_ <= position && given_back_ + 1 < fetched_.size()) {
        room_from_ = std::max(room_from_, released_[++given_back_]);
      }
      double until = fetched_[given_back_] + ring_bytes_;
      if (given_back_ + 1 == fetched_.size()) until = std::max(until, end);
      const double part = std::min(until, end) - position;
      time = std::max(time, room_from_) + latency + part * route.share / link.rate;
      latency = 0;
      position += part;
    }
    free_from_[route.link] = time;
    whole = std::max(whole, time);
  }
  return whole;
}

}  // namespace distorch
