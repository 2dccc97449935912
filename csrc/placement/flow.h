// SPDX-License-Identifier: Apache-2.0
// How long a step takes with a placement, in microseconds of work: good enough to choose among
// thousands.
#pragma once

#include <cstdint>
#include <vector>

#include "placement/problem.h"

namespace distorch {

// Note [A step as a flow]
// A rehearsal (rehearsal/rehearsal.h) runs the ring itself, and is as exact as can be. It takes
// some microseconds for each use, which is too long for a search that looks at thousands of
// placements. A flow keeps what matters most:
// * Weights are fetched in the order of their uses, over the links of their tiers.
// * The ring holds so many bytes. A byte of a fetch has room as soon as the uses before it have let
//   go of as many bytes as are needed.
// * An operator starts when the one before has ended and the last byte of its weights is there.
// * A weight that the ring must still hold is not fetched again.
// It leaves out where in the ring a weight lies, and how far ahead the ring asks. So it is a little
// faster than the ring. The best few placements are rehearsed afterwards.
class Flow {
 public:
  explicit Flow(const PlacementProblem& problem);

  // Seconds of one step among several.
  Time step(const Placement& placement);
  // How long operators have waited for each weight in the last step().
  const std::vector<Time>& stalls() const { return stalls_; }

 private:
  struct Visit {
    uint32_t weight;
    Time seconds;  // of the operator, which begins when its last weight is there
  };
  Time arrival(const PlacementProblem::Tier& tier, double bytes);

  const PlacementProblem& problem_;
  const double ring_bytes_;
  std::vector<Visit> visits_;
  Time before_ = 0;  // operators before the first visit
  std::vector<Time> stalls_;

  // --- While a step is played ---
  // Fetches until now: bytes until the end of each, and when its room was free again.
  std::vector<double> fetched_;
  std::vector<Time> released_;
  size_t given_back_ = 0;  // fetches whose room is free by `room_from_`
  Time room_from_ = 0;
  std::vector<Time> free_from_;       // by link
  std::vector<double> last_fetched_;  // by weight: bytes that had been fetched after its last use
};

}  // namespace distorch
