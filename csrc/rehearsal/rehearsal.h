// SPDX-License-Identifier: Apache-2.0
// What a step would take, before any byte has moved.
//
// Note [A rehearsal]
// A step takes as long as its operators, and as long as they wait for weights. What they wait
// depends on what the ring does: which weight it asks for when, where in its memory it puts it, and
// what it throws out. A formula for that would be a second description of the ring, and a wrong one
// as soon as the ring changes.
//
// So a rehearsal runs the ring itself, with its Forecast and its SlotCache. Only what lies below
// does not happen: a Transfer of its own moves no bytes, and keeps a virtual clock (Note [Virtual
// time]) instead of a device. Addresses are numbers, and nobody looks at what is there.
// * Stage is that clock: the streams of a compute device, its links, and the disk.
// * RehearsedDevice stands for Accelerator, and does the same things in the same order.
// * RehearsedHost is HostTransfer itself, on memory that is not there.
// * rehearse() plays the operators, and reads from the clock what they waited for.
//
// tests/prediction holds RehearsedDevice to Accelerator: it compares with the simulated
// accelerator, whose virtual time is exact.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/virtual_time.h"
#include "engine/trace_log.h"

namespace distorch {

// All that a rehearsal needs to know: a machine, weights, and a step that uses them.
struct Script {
  // From a place ("cpu", "cuda:1") to the compute device, or within it.
  struct Link {
    std::string from;
    double rate;  // bytes per second
    Time latency;
    int group = -1;  // links of one group share its rate
  };
  // Consecutive bytes of a weight. `place` is that of a link, or "disk". Pieces with one `owner`
  // may be copied together where their addresses follow each other.
  struct Piece {
    std::string place;
    uint64_t bytes;
    uint64_t owner = 0, address = 0;
  };
  struct Weight {
    std::string name;
    std::vector<Piece> pieces;
    uint64_t bytes;         // on the compute device
    bool encoded = false;   // it is decoded there, or by the host if that computes
    bool in_place = false;  // decoded where its stored bytes arrived
    Time decode_seconds = 0;
  };
  // One operator on weights, or several on none.
  struct Use {
    Time seconds;
    uint64_t operators = 1;
    std::vector<uint32_t> weights;  // indices; each one once
    uint64_t copied = 0;            // bytes of the host's, which the operator brings by itself
    bool host_waits = false;        // for all that was issued, this included
  };

  std::string compute;
  bool host_computes = false;
  uint64_t ring_bytes = 0;
  std::vector<Link> links;
  std::vector<double> groups;  // bytes per second
  double disk_rate = 1e9;
  Time disk_latency = 0;
  // Reads that the host makes at once: ahead of a use, and of weights that somebody waits for.
  uint32_t readers = 2, urgent_readers = 1;
  // What the host pays for each operator or copy that it issues, and for each event.
  Time issue_seconds = 0, event_seconds = 0;
  std::vector<Weight> weights;  // in the order in which the ring takes them to be used
  std::vector<Use> uses;
  // Whether steps are played, too, whose end the host waits for.
  bool waits = true;
  // Whether few steps are played: good enough to compare placements.
  bool brief = false;
};

struct Rehearsal {
  // What happens on one track in a counted step, on average.
  struct Traffic {
    double bytes = 0;
    Time busy = 0;
  };
  Time first = 0;   // the first step, in which nothing is known but the order
  Time step = 0;    // one of the counted steps, on average; the host is ahead of the device
  Time waited = 0;  // one of several steps whose end the host waits for, on average; 0: none was
  std::map<std::string, Time> stalls;      // by weight, in a counted step, on average
  std::map<std::string, Traffic> traffic;  // by track, such as "copies cpu->cuda:0"
  double overflows = 0;  // fetches of a counted step for which the ring had no room, on average
  std::vector<TraceSpan> spans;  // of the last counted step, from 0 on
};

// Throws std::invalid_argument on a place without a link, a use of a weight that is not there, or a
// use of no operator.
Rehearsal rehearse(const Script& script);

}  // namespace distorch
