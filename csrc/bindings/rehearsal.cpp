// SPDX-License-Identifier: Apache-2.0
#include "bindings/rehearsal.h"

#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rehearsal/rehearsal.h"

namespace distorch {
namespace {

namespace py = pybind11;

// As plain tuples. The parts are those of Script, in its order.
using Link = std::tuple<std::string, double, Time, int>;
using Piece = std::tuple<std::string, uint64_t, uint64_t, uint64_t>;
using Weight = std::tuple<std::string, std::vector<Piece>, uint64_t, bool, bool, Time>;
using Use = std::tuple<Time, uint64_t, std::vector<uint32_t>, uint64_t, bool>;
using Seconds = std::pair<Time, Time>;
using Span = std::tuple<std::string, std::string, double, double, uint64_t>;

// As a dict, by the names of Rehearsal.
py::dict rehearsed(const std::string& compute, uint64_t ring_bytes, const std::vector<Link>& links,
                   const std::vector<double>& groups, const std::pair<double, Time>& disk,
                   const std::pair<uint32_t, uint32_t>& readers, const Seconds& costs,
                   const std::vector<Weight>& weights, const std::vector<Use>& uses, bool waits,
                   bool brief) {
  Script script;
  script.compute = compute;
  script.host_computes = compute == "cpu";
  script.ring_bytes = ring_bytes;
  for (const auto& [from, rate, latency, group] : links) {
    script.links.push_back({from, rate, latency, group});
  }
  script.groups = groups;
  script.waits = waits;
  script.brief = brief;
  std::tie(script.disk_rate, script.disk_latency) = disk;
  std::tie(script.readers, script.urgent_readers) = readers;
  std::tie(script.issue_seconds, script.event_seconds) = costs;
  for (const auto& [name, pieces, bytes, encoded, in_place, decode_seconds] : weights) {
    Script::Weight weight{name, {}, bytes, encoded, in_place, decode_seconds};
    for (const auto& [place, size, owner, address] : pieces) {
      weight.pieces.push_back({place, size, owner, address});
    }
    script.weights.push_back(std::move(weight));
  }
  for (const auto& [seconds, operators, used, copied, host_waits] : uses) {
    script.uses.push_back({seconds, operators, used, copied, host_waits});
  }
  Rehearsal found;
  {
    const py::gil_scoped_release released;
    found = rehearse(script);
  }
  std::vector<Span> spans;
  for (const TraceSpan& span : found.spans) {
    spans.emplace_back(span.track, span.name, span.start, span.end, span.bytes);
  }
  std::map<std::string, std::pair<double, Time>> traffic;
  for (const auto& [track, own] : found.traffic) traffic[track] = {own.bytes, own.busy};
  using namespace py::literals;
  return py::dict("first"_a = found.first, "step"_a = found.step, "waited"_a = found.waited,
                  "stalls"_a = found.stalls, "traffic"_a = traffic, "overflows"_a = found.overflows,
                  "spans"_a = spans);
}

}  // namespace

void install_rehearsal(py::module_& module) {
  module.def("rehearse", &rehearsed, py::kw_only(), py::arg("compute"), py::arg("ring_bytes"),
             py::arg("links"), py::arg("groups"), py::arg("disk"), py::arg("readers"),
             py::arg("costs"), py::arg("weights"), py::arg("uses"), py::arg("waits") = true,
             py::arg("brief") = false);
}

}  // namespace distorch
