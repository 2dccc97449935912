// SPDX-License-Identifier: Apache-2.0
#include "placement/search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "placement/flow.h"
#include "placement/numbers.h"

namespace distorch {
namespace {

// What a donor is owed at most, as a part of the ring.
constexpr double kPiles[] = {1.0, 0.6, 0.3};
constexpr int kHalvings = 30;
constexpr double kLeast = 1.0 / 16, kMost = 256;  // times what donors shall send
constexpr uint64_t kWork = 2'000'000;             // uses that are looked at in all
constexpr uint64_t kMostChanges = 4000;           // of one beginning
// A weight of which less than this travels leaves first: it costs next to nothing.
constexpr uint64_t kLight = 8;
constexpr double kCloseEnough = 1.0002;  // to the operators' time
constexpr uint64_t kFew = 20'000;        // placements that are all looked at

struct Found {
  Time seconds;
  Placement placement;
};

class Search {
 public:
  Search(const PlacementProblem& problem, const Placement& start);
  std::vector<Placement> run(size_t most);

 private:
  std::vector<double> sent_by_each() const;
  using Stays = std::vector<bool>;  // by weight
  std::optional<Placement> spread(double pile, double generosity, const Stays* stays,
                                  bool& too_little) const;
  std::optional<Placement> keep_first(const std::vector<uint32_t>& order) const;
  void place_light(Placement& placement, std::vector<uint64_t>& room) const;
  Found best_spread(double pile);
  void improve(Found& found, uint64_t changes);
  void fill_up(Found& found, uint64_t changes);
  bool change(Placement& placement, std::vector<uint64_t>& room, size_t weight, Numbers& numbers);
  std::vector<uint64_t> room_beside(const Placement& placement) const;
  bool are_few() const;
  void look_at_all(Placement& placement, std::vector<uint64_t>& room, size_t next);
  void search();

  const PlacementProblem& problem_;
  const Placement start_;
  Flow flow_;
  const Time computing_;
  std::vector<uint32_t> in_order_;  // of their first uses; those that are never used are not there
  std::vector<Time> until_next_;    // operators until the next one of them is used
  std::vector<uint32_t> light_;
  std::vector<double> shares_;  // bytes that each tier shall send in a step
  std::vector<Found> found_;
};

Search::Search(const PlacementProblem& problem, const Placement& start)
    : problem_(problem), start_(start), flow_(problem), computing_(problem.compute_seconds()) {
  std::vector<bool> seen(problem.weights.size());
  for (const PlacementProblem::Use& use : problem.uses) {
    for (const uint32_t index : use.weights) {
      if (seen[index] || problem.weights[index].travels * kLight < problem.weights[index].bytes) {
        continue;
      }
      seen[index] = true;
      in_order_.push_back(index);
      until_next_.push_back(0);
    }
    if (!until_next_.empty()) until_next_.back() += use.seconds;
  }
  for (uint32_t i = 0; i < problem.weights.size(); ++i) {
    if (!seen[i]) light_.push_back(i);
  }
  shares_ = sent_by_each();
}

// How many bytes go over each tier's links in a step if all links end at once. The time is found
// with which it is as many as have to leave.
std::vector<double> Search::sent_by_each() const {
  double leaving = 0;
  for (const uint32_t index : in_order_) {
    leaving += static_cast<double>(problem_.weights[index].bytes);
  }
  leaving -= static_cast<double>(problem_.tiers[0].capacity);
  std::vector<double> sent(problem_.tiers.size());
  if (leaving <= 0) return sent;
  const auto send = [&](Time seconds) {
    std::vector<double> left;
    for (const PlacementProblem::Link& link : problem_.links) left.push_back(link.rate * seconds);
    double all = 0;
    double together = problem_.together > 0 ? problem_.together * seconds : leaving;
    for (size_t tier = 1; tier < sent.size(); ++tier) {
      const PlacementProblem::Tier& own = problem_.tiers[tier];
      double most = std::min(static_cast<double>(own.capacity), together);
      for (const auto& route : own.routes) most = std::min(most, left[route.link] / route.share);
      for (const auto& route : own.routes) left[route.link] -= most * route.share;
      together -= most;
      sent[tier] = most;
      all += most;
    }
    return all;
  };
  Time low = 0, high = 1e-6;
  while (send(high) < leaving && high < 1e9) high *= 2;
  for (int i = 0; i < kHalvings; ++i) {
    const Time middle = (low + high) / 2;
    (send(middle) < leaving ? low : high) = middle;
  }
  send(high);
  return sent;
}

std::vector<uint64_t> Search::room_beside(const Placement& placement) const {
  std::vector<uint64_t> room = problem_.capacities();
  for (size_t i = 0; i < placement.size(); ++i) room[placement[i]] -= problem_.weights[i].bytes;
  return room;
}

// Weights with one choice have it. Those that hardly travel go to the slowest donors that have
// room.
void Search::place_light(Placement& placement, std::vector<uint64_t>& room) const {
  for (size_t i = 0; i < placement.size(); ++i) {
    const uint32_t allowed = problem_.weights[i].allowed;
    if (!std::has_single_bit(allowed)) continue;
    const auto tier = static_cast<size_t>(std::countr_zero(allowed));
    if (problem_.weights[i].bytes > room[tier]) continue;
    placement[i] = static_cast<uint8_t>(tier);
    room[tier] -= problem_.weights[i].bytes;
  }
  const auto rate = [&](size_t tier) {
    double least = kNever;
    for (const PlacementProblem::Route& route : problem_.tiers[tier].routes) {
      least = std::min(least, problem_.links[route.link].rate / route.share);
    }
    return least;
  };
  std::vector<size_t> tiers(problem_.tiers.size());
  std::iota(tiers.begin(), tiers.end(), 0);
  std::stable_sort(tiers.begin(), tiers.end(),
                   [&](size_t a, size_t b) { return rate(a) < rate(b); });
  for (const uint32_t index : light_) {
    if (std::has_single_bit(problem_.weights[index].allowed)) continue;
    const uint64_t bytes = problem_.weights[index].bytes;
    for (const size_t tier : tiers) {
      if (!problem_.may_lie(index, tier) || bytes > room[tier]) continue;
      placement[index] = static_cast<uint8_t>(tier);
      room[tier] -= bytes;
      break;
    }
  }
}

// Point 1 of the note. Nothing if some weight finds no room. `too_little`: donors were owed so
// little that some weight should have stayed for which there was no room.
// `stays`: which weights stay, if that was decided before.
std::optional<Placement> Search::spread(double pile, double generosity, const Stays* stays,
                                        bool& too_little) const {
  constexpr uint8_t kNowhere = 255;
  const size_t tiers = problem_.tiers.size();
  Placement placement(problem_.weights.size(), kNowhere);
  std::vector<uint64_t> room = problem_.capacities();
  place_light(placement, room);
  const double most = pile * static_cast<double>(problem_.ring_bytes);
  std::vector<double> owed(tiers);
  for (size_t tier = 1; tier < tiers; ++tier) owed[tier] = std::min(most, shares_[tier]) / 2;
  const auto owe_more = [&](size_t i, double size) {
    const double part = computing_ > 0 ? generosity * until_next_[i] / computing_ : generosity;
    for (size_t tier = 1; tier < tiers; ++tier) {
      owed[tier] = std::min(owed[tier] + part * shares_[tier], std::max(most, size / 2));
    }
  };
  for (size_t i = 0; i < in_order_.size(); ++i) {
    const uint32_t index = in_order_[i];
    const uint64_t bytes = problem_.weights[index].bytes;
    const auto size = static_cast<double>(bytes);
    if (placement[index] != kNowhere) {  // it had one choice
      owed[placement[index]] -= size;
      owe_more(i, size);
      continue;
    }
    std::optional<size_t> best;
    double longest = 0;
    const bool decided = stays != nullptr && (*stays)[index];
    for (size_t tier = 1; tier < tiers; ++tier) {
      if (!problem_.may_lie(index, tier) || bytes > room[tier]) continue;
      // In units of the tier's own rate, so that a slow one gets its turn.
      const double waits = (owed[tier] - size / 2) / std::max(shares_[tier], 1.0);
      if (!best || waits > longest) {
        best = tier;
        longest = waits;
      }
    }
    const bool owed_little = stays == nullptr && longest < 0;
    if (problem_.may_lie(index, 0) && (!best || owed_little || decided)) {
      if (bytes <= room[0]) {
        best = 0;
      } else {
        too_little = true;
      }
    }
    if (!best) return std::nullopt;
    placement[index] = static_cast<uint8_t>(*best);
    room[*best] -= bytes;
    owed[*best] -= size;
    owe_more(i, size);
  }
  const bool complete = std::find(placement.begin(), placement.end(), kNowhere) == placement.end();
  return complete ? std::optional(std::move(placement)) : std::nullopt;
}

// Donors are owed as little as will do.
Found Search::best_spread(double pile) {
  Found best{kNever, {}};
  double low = std::log(kLeast), high = std::log(kMost);
  for (int i = 0; i < kHalvings / 2; ++i) {
    const double middle = (low + high) / 2;
    bool too_little = false;
    const auto placement = spread(pile, std::exp(middle), nullptr, too_little);
    (too_little || !placement ? low : high) = middle;
    if (!placement) continue;
    const Time seconds = flow_.step(*placement);
    if (seconds < best.seconds) best = {seconds, *placement};
  }
  return best;
}

// The first weights of `order` stay, as many as have room, and the others are spread over donors.
std::optional<Placement> Search::keep_first(const std::vector<uint32_t>& order) const {
  Stays stays(problem_.weights.size());
  uint64_t room = problem_.tiers[0].capacity;
  for (const uint32_t index : order) {
    const uint64_t bytes = problem_.weights[index].bytes;
    if (!problem_.may_lie(index, 0) || bytes > room) continue;
    stays[index] = true;
    room -= bytes;
  }
  bool too_little = false;
  return spread(1, 1, &stays, too_little);
}

// Puts `weight` somewhere else. False: this would not fit, and nothing has changed.
bool Search::change(Placement& placement, std::vector<uint64_t>& room, size_t weight,
                    Numbers& numbers) {
  const auto bytes = [&](size_t index) { return problem_.weights[index].bytes; };
  const size_t from = placement[weight];
  const size_t other = numbers.below(placement.size());
  const size_t to = numbers.below(4) == 0 ? numbers.below(room.size()) : placement[other];
  if (to == from || !problem_.may_lie(weight, to)) return false;
  if (bytes(weight) <= room[to]) {
    placement[weight] = static_cast<uint8_t>(to);
    room[to] -= bytes(weight);
    room[from] += bytes(weight);
    return true;
  }
  if (to != placement[other] || !problem_.may_lie(other, from)) return false;
  if (bytes(weight) > room[to] + bytes(other)) return false;
  if (bytes(other) > room[from] + bytes(weight)) return false;
  placement[weight] = static_cast<uint8_t>(to);
  placement[other] = static_cast<uint8_t>(from);
  room[to] += bytes(other);
  room[to] -= bytes(weight);
  room[from] += bytes(weight);
  room[from] -= bytes(other);
  return true;
}

// Point 2 of the note.
void Search::improve(Found& found, uint64_t changes) {
  found.seconds = flow_.step(found.placement);
  std::vector<Time> stalls = flow_.stalls();
  std::vector<uint64_t> room = room_beside(found.placement);
  std::vector<size_t> position(problem_.weights.size(), in_order_.size());  // there, or behind it
  for (size_t i = 0; i < in_order_.size(); ++i) position[in_order_[i]] = i;
  Numbers numbers;
  for (uint64_t tried = 0, looked = 0; tried < changes && looked < 8 * changes; ++looked) {
    const Time all = std::accumulate(stalls.begin(), stalls.end(), Time{0});
    if (all <= 0 || found.seconds <= computing_ * kCloseEnough) return;
    // A weight is chosen as often as operators wait for it, or one of the five before.
    constexpr uint64_t kFine = 1 << 20;
    Time at = all * static_cast<double>(numbers.below(kFine)) / kFine;
    size_t weight = 0;
    while (weight + 1 < stalls.size() && (at -= stalls[weight]) > 0) ++weight;
    if (stalls[weight] <= 0) continue;
    if (numbers.below(4) == 0 && position[weight] < in_order_.size()) {
      const size_t before = numbers.below(6);
      weight = in_order_[(position[weight] + in_order_.size() - before % in_order_.size()) %
                         in_order_.size()];
    }
    Placement changed = found.placement;
    std::vector<uint64_t> left = room;
    if (!change(changed, left, weight, numbers)) continue;
    ++tried;
    const Time seconds = flow_.step(changed);
    if (seconds > found.seconds) continue;
    stalls = flow_.stalls();
    found = {seconds, std::move(changed)};
    found_.push_back(found);
    room = std::move(left);
  }
}

// What still fits on the compute device moves there, the largest first. It need not travel then.
void Search::fill_up(Found& found, uint64_t changes) {
  uint64_t room = room_beside(found.placement)[0];
  std::vector<uint32_t> largest_first = in_order_;
  std::stable_sort(largest_first.begin(), largest_first.end(), [&](uint32_t a, uint32_t b) {
    return problem_.weights[a].bytes > problem_.weights[b].bytes;
  });
  for (const uint32_t index : largest_first) {
    if (changes == 0) return;
    if (found.placement[index] == 0 || !problem_.may_lie(index, 0)) continue;
    if (problem_.weights[index].bytes > room) continue;
    --changes;
    Placement changed = found.placement;
    changed[index] = 0;
    const Time seconds = flow_.step(changed);
    if (seconds > found.seconds) continue;
    found = {seconds, std::move(changed)};
    room -= problem_.weights[index].bytes;
  }
}

bool Search::are_few() const {
  const uint64_t few = std::min(kFew, kWork / (problem_.uses.size() + 1));
  uint64_t placements = 1;
  for (size_t i = 0; i < problem_.weights.size() && placements <= few; ++i) {
    uint64_t choices = 0;
    for (size_t tier = 0; tier < problem_.tiers.size(); ++tier)
      choices += problem_.may_lie(i, tier);
    placements *= choices;
  }
  return placements <= few;
}

// All ways to place the weights from `next` on.
void Search::look_at_all(Placement& placement, std::vector<uint64_t>& room, size_t next) {
  if (next == placement.size()) {
    found_.push_back({flow_.step(placement), placement});
    return;
  }
  const uint64_t bytes = problem_.weights[next].bytes;
  for (size_t tier = 0; tier < room.size(); ++tier) {
    if (!problem_.may_lie(next, tier) || bytes > room[tier]) continue;
    placement[next] = static_cast<uint8_t>(tier);
    room[tier] -= bytes;
    look_at_all(placement, room, next + 1);
    room[tier] += bytes;
  }
}

void Search::search() {
  std::vector<Found> beginnings{{flow_.step(start_), start_}};
  for (const double pile : kPiles) {
    Found best = best_spread(pile);
    if (best.seconds < kNever) beginnings.push_back(std::move(best));
  }
  // Weights with many bytes for little computation, which nothing hides; and large ones.
  std::vector<uint32_t> order = in_order_;
  std::vector<Time> own(problem_.weights.size());
  for (size_t i = 0; i < in_order_.size(); ++i) own[in_order_[i]] = until_next_[i];
  const auto bytes = [&](uint32_t index) {
    return static_cast<double>(problem_.weights[index].bytes);
  };
  const auto by_need = [&](uint32_t a, uint32_t b) {
    return bytes(a) * own[b] > bytes(b) * own[a];
  };
  const auto by_bytes = [&](uint32_t a, uint32_t b) { return bytes(a) > bytes(b); };
  std::stable_sort(order.begin(), order.end(), by_need);
  if (const auto kept = keep_first(order)) beginnings.push_back({flow_.step(*kept), *kept});
  std::stable_sort(order.begin(), order.end(), by_bytes);
  if (const auto kept = keep_first(order)) beginnings.push_back({flow_.step(*kept), *kept});
  size_t visits = 1;
  for (const PlacementProblem::Use& use : problem_.uses) visits += use.weights.size();
  const uint64_t changes = std::min(kMostChanges, kWork / (beginnings.size() * visits * 4) + 1);
  for (Found& each : beginnings) {
    found_.push_back(each);
    improve(each, changes);
    fill_up(each, changes / 4);
    found_.push_back(std::move(each));
  }
}

std::vector<Placement> Search::run(size_t most) {
  if (are_few()) {
    Placement placement = start_;
    std::vector<uint64_t> room = problem_.capacities();
    look_at_all(placement, room, 0);
  } else {
    search();
  }
  std::stable_sort(found_.begin(), found_.end(),
                   [](const Found& a, const Found& b) { return a.seconds < b.seconds; });
  std::vector<Placement> result;
  for (Found& each : found_) {
    if (result.size() >= most) break;
    if (std::find(result.begin(), result.end(), each.placement) == result.end()) {
      result.push_back(std::move(each.placement));
    }
  }
  return result;
}

}  // namespace

std::vector<Placement> find_placements(const PlacementProblem& problem, const Placement& start,
                                       size_t most) {
  return Search(problem, start).run(most);
}

}  // namespace distorch
