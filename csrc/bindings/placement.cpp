// SPDX-License-Identifier: Apache-2.0
#include "bindings/placement.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "placement/bound.h"
#include "placement/search.h"

namespace distorch {
namespace {

namespace py = pybind11;

// As plain tuples. The parts are those of PlacementProblem, in its order.
using LinkNumbers = std::pair<double, Time>;
using TierNumbers = std::pair<uint64_t, std::vector<std::pair<uint32_t, double>>>;
using WeightNumbers = std::tuple<uint64_t, uint64_t, uint32_t>;
using UseNumbers = std::pair<Time, std::vector<uint32_t>>;

constexpr size_t kMostTiers = 32;

PlacementProblem problem_of(const std::vector<LinkNumbers>& links, double together,
                            const std::vector<TierNumbers>& tiers,
                            const std::vector<WeightNumbers>& weights,
                            const std::vector<UseNumbers>& uses, uint64_t ring_bytes) {
  if (tiers.empty() || tiers.size() > kMostTiers) throw std::invalid_argument("1 to 32 tiers");
  PlacementProblem problem;
  problem.together = together;
  problem.ring_bytes = ring_bytes;
  for (const auto& [rate, latency] : links) problem.links.push_back({rate, latency});
  for (const auto& [capacity, routes] : tiers) {
    PlacementProblem::Tier tier{capacity, {}};
    for (const auto& [link, share] : routes) {
      if (link >= links.size())
        throw std::invalid_argument("a route over a link that is not there");
      tier.routes.push_back({link, share});
    }
    problem.tiers.push_back(std::move(tier));
  }
  for (const auto& [bytes, travels, allowed] : weights) {
    problem.weights.push_back({bytes, travels, allowed});
  }
  for (const auto& [seconds, used] : uses) {
    for (const uint32_t index : used) {
      if (index >= weights.size())
        throw std::invalid_argument("a use of a weight that is not there");
    }
    problem.uses.push_back({seconds, used});
  }
  return problem;
}

}  // namespace

void install_placement(py::module_& module) {
  module.def(
      "find_placements",
      [](const std::vector<LinkNumbers>& links, double together,
         const std::vector<TierNumbers>& tiers, const std::vector<WeightNumbers>& weights,
         const std::vector<UseNumbers>& uses, uint64_t ring_bytes,
         const std::vector<uint32_t>& start, size_t most) {
        const auto problem = problem_of(links, together, tiers, weights, uses, ring_bytes);
        if (start.size() != weights.size()) throw std::invalid_argument("a start for each weight");
        Placement begin;
        for (const uint32_t tier : start) {
          if (tier >= tiers.size())
            throw std::invalid_argument("a start on a tier that is not there");
          begin.push_back(static_cast<uint8_t>(tier));
        }
        if (!problem.allows(begin)) throw std::invalid_argument("a start beyond the capacities");
        const py::gil_scoped_release released;
        std::vector<std::vector<uint32_t>> found;
        for (const Placement& each : find_placements(problem, begin, most)) {
          found.emplace_back(each.begin(), each.end());
        }
        return found;
      },
      py::kw_only(), py::arg("links"), py::arg("together"), py::arg("tiers"), py::arg("weights"),
      py::arg("uses"), py::arg("ring_bytes"), py::arg("start"), py::arg("most"));
  module.def(
      "step_bound",
      [](const std::vector<LinkNumbers>& links, double together,
         const std::vector<TierNumbers>& tiers, const std::vector<WeightNumbers>& weights,
         const std::vector<UseNumbers>& uses, uint64_t ring_bytes) {
        const auto problem = problem_of(links, together, tiers, weights, uses, ring_bytes);
        const py::gil_scoped_release released;
        return step_bound(problem);
      },
      py::kw_only(), py::arg("links"), py::arg("together"), py::arg("tiers"), py::arg("weights"),
      py::arg("uses"), py::arg("ring_bytes"));
}

}  // namespace distorch
