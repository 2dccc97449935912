// SPDX-License-Identifier: Apache-2.0
// The simulated machine: devices, links and streams under a virtual clock.
//
// Note [Virtual time]
// A discrete-event simulation without threads. The host has one clock, which
// only the host's own doings move: fixed costs per call, and waiting. What it
// issues is queued on streams with the time of issue; the queues are played
// when somebody asks (a query plays up to the host's time, a synchronisation
// until the thing waited for has ended, and the host's clock then follows).
// Time on a link is never given out in the order of issue: a copy that was
// issued early but waits for an event does not delay the others.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "sim/ledger.h"

namespace distorch::sim {

using Time = double;  // seconds

// "sim:0" -> 0; the host is kHost.
inline constexpr int kHost = -1;
inline constexpr Time kNever = std::numeric_limits<Time>::infinity();

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

// A point in a stream's work: reached or not, and when.
struct Mark {
  uint64_t epoch = 0;             // of the machine's clock
  std::atomic<bool> done{false};  // under the machine's mutex, but for a look from outside of it
  Time time = 0;
  VectorClock clock;
};
using MarkPtr = std::shared_ptr<Mark>;

// One piece of work on a stream. `amount` is in seconds on a device and in
// bytes on a link.
struct Task {
  std::string label;
  std::vector<Access> accesses;
  int resource = -1;  // from compute() or link(); -1 takes no time
  double amount = 0;
  std::function<void()> start;
  std::function<void()> end;
};

struct Span {
  Time start, end;
  std::string resource, label;
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
  std::vector<Span> timeline();

  // A link (or every link, -1) runs at 1 / factor between two times.
  void slow(int from, int to, double factor, Time start, Time end);
  // The nth copy from now fails; `nth` counts from 1.
  void fail_copy(uint64_t nth);
  void fail_device(int device);
  // Throws std::runtime_error where a fault was asked for.
  void check_device(int device);
  void check_copy();

 private:
  struct Item {
    enum class Kind { kTask, kRecord, kWait } kind;
    Time issued;
    Task task;
    MarkPtr mark;
  };
  struct Stream {
    std::string name;
    size_t own = 0;  // its place in vector clocks; 0 is the host's
    std::deque<Item> queue;
    bool running = false;  // the front is
    Time started = 0;
    Time flows_from = 0;  // after its latency
    double left = 0;
    VectorClock clock;
  };
  struct Resource {
    std::string name;
    double rate = 1;
    Time latency = 0;
    int group = -1;
  };
  struct Slow {
    int resource;
    double factor;
    Time start, end;
  };

  using Lock = std::lock_guard<std::recursive_mutex>;

  void run_until(Time limit, const std::function<bool()>& reached);
  void run_all() {
    run_until(kNever, [] { return false; });
  }
  void run_to_host() {
    run_until(host_, [] { return false; });
  }
  bool start_ready();
  void begin(Stream& stream, Item& item);
  void finish(Stream& stream);
  double rate_of(const Stream& stream, const std::vector<int>& on_resource,
                 const std::vector<int>& in_group) const;
  double slowed(int resource) const;
  void tick(Stream& stream);
  void throw_pending();

  mutable std::recursive_mutex mutex_;
  Config config_;
  std::vector<Resource> resources_;
  std::vector<double> group_rates_;
  std::map<std::pair<int, int>, int> link_ids_;
  std::deque<Stream> streams_;
  std::vector<int> readers_;  // streams: two in turn, and one for urgent reads
  size_t next_reader_ = 0;
  std::set<size_t> busy_;  // indices of streams with a queue
  VectorClock host_clock_;
  Ledger ledger_;
  std::vector<Span> timeline_;
  std::vector<Slow> slow_;
  std::vector<bool> lost_;
  uint64_t fail_copy_in_ = 0;
  uint64_t epoch_ = 0;  // counts resets
  Time host_ = 0;
  Time played_ = 0;  // the queues were played up to here
  std::exception_ptr pending_;
};

}  // namespace distorch::sim
