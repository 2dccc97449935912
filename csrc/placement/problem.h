// SPDX-License-Identifier: Apache-2.0
// Where the weights of a model may lie, and what a step does with them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/virtual_time.h"

namespace distorch {

// Bytes are those of a step that repeats: after its last use comes its first one again.
struct PlacementProblem {
  // What brings bytes to the compute device, or a disk to host memory.
  struct Link {
    double rate;  // bytes per second
    Time latency;
  };
  // A fetch from a tier takes these parts of its bytes over these links, all at once: a stripe of
  // each donor, or all of them over the disk and over the link from host memory.
  struct Route {
    uint32_t link;
    double share;
  };
  struct Tier {
    uint64_t capacity;  // bytes that may lie there
    std::vector<Route> routes;
  };
  struct Weight {
    uint64_t bytes;
    uint64_t travels;  // what a use brings if the weight is not resident: of a table, some rows
    uint32_t allowed;  // a bit for each tier on which the weight may lie
  };
  struct Use {
    Time seconds;
    std::vector<uint32_t> weights;  // indices
  };

  std::vector<Link> links;
  double together = 0;  // bytes per second of all links at once; 0: they do not hinder each other
  std::vector<Tier> tiers;  // the first one is the compute device, and has no routes
  std::vector<Weight> weights;
  std::vector<Use> uses;
  uint64_t ring_bytes = 0;

  bool may_lie(size_t weight, size_t tier) const {
    return (weights[weight].allowed >> tier & 1) != 0;
  }
  std::vector<uint64_t> capacities() const {
    std::vector<uint64_t> found;
    for (const Tier& tier : tiers) found.push_back(tier.capacity);
    return found;
  }
  // Whether such a placement is within the capacities, and each weight lies where it may.
  bool allows(const std::vector<uint8_t>& placement) const {
    std::vector<uint64_t> room = capacities();
    for (size_t i = 0; i < weights.size(); ++i) {
      const uint8_t tier = placement[i];
      if (tier >= tiers.size() || !may_lie(i, tier) || weights[i].bytes > room[tier]) return false;
      room[tier] -= weights[i].bytes;
    }
    return true;
  }
  Time compute_seconds() const {
    Time found = 0;
    for (const Use& use : uses) found += use.seconds;
    return found;
  }
};

// The tier of each weight.
using Placement = std::vector<uint8_t>;

}  // namespace distorch
