// SPDX-License-Identifier: Apache-2.0
// The machine of a rehearsal: streams, links and a disk under a virtual clock, and memory that is
// not there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/virtual_reads.h"
#include "core/virtual_time.h"
#include "rehearsal/rehearsal.h"

namespace distorch {

class Stage : public ReadClock {
 public:
  explicit Stage(const Script& script);

  VirtualTime& time() { return time_; }
  const std::string& compute_device() const { return script_.compute; }
  int compute_stream() const { return compute_stream_; }
  // A new one. What runs on it appears on this track.
  int new_stream(std::string track);
  const std::string& track_of(int stream) const { return tracks_[static_cast<size_t>(stream)]; }
  // Throws std::invalid_argument where there is no link from that place.
  void check_link(const std::string& place) const { static_cast<void>(link_from(place)); }

  // --- What the host asks for, and pays for ---
  // Operators that take so long together, under the name of one of them. The first is issued at
  // once.
  void compute(std::string name, Time seconds, uint64_t operators);
  // Bytes from a place. The compute device copies its own with what it computes with.
  void copy(int stream, const std::string& name, const std::string& place, uint64_t bytes);
  // What the compute device does on another stream.
  void compute_on(int stream, std::string name, Time seconds) {
    run(stream, std::move(name), compute_, seconds);
  }
  MarkPtr record(int stream);
  void wait(int stream, const MarkPtr& mark);

  // Addresses that nothing else has. Nobody may look at what is there.
  std::shared_ptr<std::byte> no_memory(uint64_t bytes);

  // --- ReadClock: the disk, with its readers in turn ---
  void* begin(uint64_t bytes, bool urgent) override;
  bool ended(void* read) override;
  void wait(void* read) override;
  void forget(void* read) override;

 private:
  struct Link {
    int resource;
    double per_byte;  // of the resource's amount
  };
  const Link& link_from(const std::string& place) const;
  void run(int stream, std::string name, int resource, double amount);

  const Script& script_;
  VirtualTime time_;
  std::vector<std::string> tracks_;  // by stream
  std::map<std::string, Link> links_;
  int compute_, disk_;  // resources
  int compute_stream_;
  // Streams. The next read of that kind is for the first one of its list.
  std::deque<int> readers_, urgent_readers_;
  uint64_t next_address_;
};

}  // namespace distorch
