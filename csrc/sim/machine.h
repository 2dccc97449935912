// SPDX-License-Identifier: Apache-2.0
// The simulated machine: devices, links and streams under a virtual clock (Note [Virtual time]),
// and what a real machine would never tell: who touched which bytes, and faults that are asked for.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/virtual_time.h"
#include "sim/ledger.h"

namespace distorch::sim {

// "sim:0" -> 0; the host is kHost.
inline constexpr int kHost = -1;

struct LinkConfig {
  int from, to;  // devices, or kHost
  double rate;   // bytes per second
  Time latency;
};

enum class Mode { kDeferred, kEager, kDry };

struct Config {
  int devices = 1;
  uint64_t memory = uint64_t{24} << 30;  // bytes of each device
  double flops = 35e12;                  // per second
  double memory_bandwidth = 900e9;       // bytes per second
  std::vector<LinkConfig> links;
  std::vector<std::vector<size_t>> shared;  // indices into `links`
  double disk_rate = 3e9;                   // bytes per second
  Time disk_latency = 80e-6;
  Mode mode = Mode::kDeferred;
};

// What the host pays for a call.
inline constexpr Time kIssueCost = 2e-6;
inline constexpr Time kEventCost = 0.3e-6;
inline constexpr Time kQueryCost = 0.2e-6;

// A point in a stream's work, and what the stream had seen by then.
struct Mark : distorch::Mark {
  VectorClock clock;
};
using MarkPtr = std::shared_ptr<Mark>;

// One piece of work on a stream. `resource` is from resource_of_device() or link(). `amount` is in
// seconds on a device and in bytes on a link.
struct Task : VirtualTask {
  std::vector<Access> accesses;
};

class Machine {
 public:
  // The one of this process.
  static Machine& instance();

  void configure(Config config);
  const Config& config() const { return config_; }
  // Clocks, statistics, faults and races; streams and memory stay.
  void reset();

  Time now();
  void host_work(Time seconds);

  int new_stream(std::string name);
  int resource_of_device(int device) const;
  // -1 when there is no such link.
  int link(int from, int to) const;

  void issue(int stream, Task task, Time cost = kIssueCost);
  MarkPtr record(int stream, Time cost = kEventCost);
  void wait(int stream, const MarkPtr& mark);
  bool query(const MarkPtr& mark);
  bool query_stream(int stream);
  void synchronize(const MarkPtr& mark);
  void synchronize_stream(int stream);
  void synchronize_all();

  // A read of a file, by a thread of the host's that costs the host nothing. An
  // urgent one does not queue behind others, but shares the disk with them.
  MarkPtr read_file(uint64_t bytes, bool urgent);
  // Whether the host has come to a mark, and waiting for it: what a thread of its
  // own notices, at no cost.
  bool reached(const MarkPtr& mark);
  void await(const MarkPtr& mark);

  // The host itself reads or writes memory that streams know.
  void host_access(Access access, const std::string& label);
  void forget(uintptr_t begin, uintptr_t end);

  std::vector<std::string> races();
  std::vector<VirtualSpan> timeline();

  // A link (or every link, -1) runs at 1 / factor between two times.
  void slow(int from, int to, double factor, Time start, Time end);
  // The nth copy from now fails; `nth` counts from 1.
  void fail_copy(uint64_t nth);
  void fail_device(int device);
  // Throws std::runtime_error where a fault was asked for.
  void check_device(int device);
  void check_copy();

 private:
  // Its place in vector clocks is its number + 1; 0 is the host's.
  struct Stream {
    std::string name;
    VectorClock clock;
  };

  using Lock = std::lock_guard<std::recursive_mutex>;

  Stream& stream(int id) { return streams_.at(static_cast<size_t>(id)); }
  void tick(int id);
  void throw_pending();

  mutable std::recursive_mutex mutex_;
  Config config_;
  VirtualTime time_;
  int disk_ = 0;  // a resource, as those of the links
  std::map<std::pair<int, int>, int> link_ids_;
  std::vector<Stream> streams_;
  std::vector<int> readers_;  // streams: two in turn, and one for urgent reads
  size_t next_reader_ = 0;
  VectorClock host_clock_;
  Ledger ledger_;
  std::vector<bool> lost_;
  uint64_t fail_copy_in_ = 0;
};

}  // namespace distorch::sim
