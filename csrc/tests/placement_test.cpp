// SPDX-License-Identifier: Apache-2.0
// The flow against times that follow from the numbers, the bound against all placements, and what a
// search promises.
#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "placement/bound.h"
#include "placement/flow.h"
#include "placement/numbers.h"
#include "placement/search.h"
#include "tests/check.h"

using namespace distorch;

namespace {

constexpr uint64_t kMany = uint64_t{1} << 50;

bool near(double found, double expected) { return std::abs(found - expected) <= 1e-3 * expected; }

// `count` weights of 1 MB, each used once by an operator of so many seconds, and one donor over a
// link of 1 GB/s.
PlacementProblem chain(uint32_t count, Time seconds, uint64_t stay, uint64_t ring) {
  PlacementProblem problem;
  problem.links = {{1e9, 0}};
  problem.tiers = {{stay, {}}, {kMany, {{0, 1.0}}}};
  for (uint32_t i = 0; i < count; ++i) {
    problem.weights.push_back({1'000'000, 1'000'000, 3});
    problem.uses.push_back({seconds, {i}});
  }
  problem.ring_bytes = ring;
  return problem;
}

// Weights of all sizes, and two donors of which one is small.
PlacementProblem uneven(uint32_t count, uint64_t seed) {
  Numbers numbers(seed);
  PlacementProblem problem;
  problem.links = {{1e9 + 1e6 * static_cast<double>(numbers.below(4000)), 1e-5}, {3e9, 1e-6}};
  uint64_t total = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t bytes = 4096 * (1 + numbers.below(2000));
    problem.weights.push_back({bytes, bytes, 7});
    problem.uses.push_back({1e-6 * static_cast<double>(numbers.below(9000)), {i}});
    total += bytes;
  }
  problem.tiers = {{total / 3, {}}, {kMany, {{0, 1.0}}}, {total / 4, {{1, 1.0}}}};
  problem.ring_bytes = 16 << 20;
  return problem;
}

void a_flow_takes_as_long_as_what_binds() {
  const Placement away(12, 1), here(12, 0);
  const PlacementProblem computing = chain(12, 2e-3, 0, 4'000'000);
  CHECK(near(Flow(computing).step(away), 12 * 2e-3));
  const PlacementProblem copying = chain(12, 0.2e-3, 0, 4'000'000);
  Flow flow(copying);
  CHECK(near(flow.step(away), 12 * 1e-3));
  double waited = 0;
  for (const Time stall : flow.stalls()) waited += stall;
  CHECK(near(waited, 12 * 0.8e-3));
  CHECK(near(flow.step(here), 12 * 0.2e-3));
  // A ring that holds all of them brings them once and for all.
  const PlacementProblem held = chain(12, 0.2e-3, 0, 12'000'000);
  CHECK(near(Flow(held).step(away), 12 * 0.2e-3));
  // Without a ring nothing is brought while an operator runs.
  const PlacementProblem alone = chain(12, 2e-3, 0, 0);
  CHECK(near(Flow(alone).step(away), 12 * 3e-3));
}

void two_links_share_the_work() {
  PlacementProblem problem = chain(12, 0, 0, 4'000'000);
  problem.links.push_back({1e9, 0});
  problem.tiers.push_back({kMany, {{1, 1.0}}});
  Placement both(12, 1);
  for (size_t i = 0; i < both.size(); i += 2) both[i] = 2;
  CHECK(near(Flow(problem).step(both), 6e-3));
  // A stripe takes half of each weight over each link.
  problem.tiers.push_back({kMany, {{0, 0.5}, {1, 0.5}}});
  CHECK(near(Flow(problem).step(Placement(12, 3)), 6e-3));
}

void a_bound_follows_from_the_numbers() {
  CHECK(near(step_bound(chain(12, 2e-3, 0, 4'000'000)), 24e-3));
  CHECK(near(step_bound(chain(12, 0.2e-3, 0, 4'000'000)), 12e-3));
  CHECK(near(step_bound(chain(12, 0.2e-3, 2'999'999, 4'000'000)), 10e-3));  // two whole ones stay
  CHECK(near(step_bound(chain(12, 0.2e-3, 0, 12'000'000)), 12 * 0.2e-3));
  // The first half has all the bytes and no computation, so nothing hides them.
  PlacementProblem problem = chain(20, 0, 0, 2'000'000);
  for (size_t i = 10; i < 20; ++i) {
    problem.weights[i] = {4096, 4096, 3};
    problem.uses[i].seconds = 2e-3;
  }
  CHECK(near(step_bound(problem), 20e-3 + 8e-3));
}

void no_placement_beats_the_bound() {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    PlacementProblem problem = uneven(7, seed);
    problem.ring_bytes = seed % 2 == 0 ? 16 << 20 : 8 << 20;
    Flow flow(problem);
    Time best = kNever;
    Placement placement(7, 0);
    for (int code = 0; code < 2187; ++code) {
      int rest = code;
      std::vector<uint64_t> room;
      for (const auto& tier : problem.tiers) room.push_back(tier.capacity);
      bool fits = true;
      for (size_t i = 0; i < 7; ++i, rest /= 3) {
        placement[i] = static_cast<uint8_t>(rest % 3);
        fits = fits && problem.weights[i].bytes <= room[placement[i]];
        if (fits) room[placement[i]] -= problem.weights[i].bytes;
      }
      if (fits) best = std::min(best, flow.step(placement));
    }
    CHECK(step_bound(problem) <= best * 1.0001);
    const auto found = find_placements(problem, Placement(7, 1), 1);
    CHECK(found.size() == 1);
    CHECK(flow.step(found.front()) <= best * (1 + 1e-12));  // all are looked at
  }
}

void a_search_keeps_its_promises() {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    PlacementProblem problem = uneven(60, seed);
    problem.weights[3].allowed = 1;  // stays
    problem.weights[4].allowed = 6;  // leaves
    problem.weights[5].allowed = 4;  // was sent to the second donor
    problem.weights[6].travels = 0;  // is not used
    Placement start(60, 1);
    start[3] = 0;
    start[5] = 2;
    Flow flow(problem);
    const Time before = flow.step(start);
    const auto found = find_placements(problem, start, 9);
    CHECK(!found.empty() && found.size() <= 9);
    CHECK(std::set<Placement>(found.begin(), found.end()).size() == found.size());
    Time last = 0;
    for (const Placement& placement : found) {
      const Time seconds = flow.step(placement);
      CHECK(seconds >= last);
      last = seconds;
      std::vector<uint64_t> held(3);
      for (size_t i = 0; i < placement.size(); ++i) {
        CHECK(problem.may_lie(i, placement[i]));
        held[placement[i]] += problem.weights[i].bytes;
      }
      for (size_t tier = 0; tier < 3; ++tier) CHECK(held[tier] <= problem.tiers[tier].capacity);
    }
    CHECK(flow.step(found.front()) <= before);
    CHECK(flow.step(found.front()) >= step_bound(problem) * 0.999);
    CHECK(find_placements(problem, start, 9) == found);
  }
}

void light_weights_alone() {
  PlacementProblem problem = chain(30, 1e-4, 4'000'000, 0);
  for (PlacementProblem::Weight& weight : problem.weights) weight.travels = 1000;  // tables
  const auto found = find_placements(problem, Placement(30, 1), 3);
  CHECK(!found.empty());
  for (const Placement& each : found) CHECK(problem.allows(each));
  // A table travels in part, so that nothing is rounded to whole weights.
  PlacementProblem mixed = chain(8, 0, 0, 1'000'000);
  mixed.weights.push_back({8'000'000, 4000, 3});
  mixed.uses.push_back({0, {8}});
  CHECK(near(step_bound(mixed), 8e-3 + 4e-6));
}

void what_nothing_hides_stays() {
  // Large weights with no computation first, then small ones with much.
  PlacementProblem problem = chain(40, 1e-3, 10'000'000, 2'000'000);
  for (size_t i = 0; i < 10; ++i) problem.uses[i].seconds = 0;
  Flow flow(problem);
  Placement start(40, 1);
  for (size_t i = 0; i < 40; i += 4) start[i] = 0;
  const Placement best = find_placements(problem, start, 1).front();
  CHECK(flow.step(best) <= 0.9 * flow.step(start));
  CHECK(flow.step(best) <= step_bound(problem) * 1.05);
}

}  // namespace

int main() {
  a_flow_takes_as_long_as_what_binds();
  two_links_share_the_work();
  a_bound_follows_from_the_numbers();
  no_placement_beats_the_bound();
  a_search_keeps_its_promises();
  light_weights_alone();
  what_nothing_hides_stays();
  return 0;
}
