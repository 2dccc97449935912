// SPDX-License-Identifier: Apache-2.0
// Streams, links and a host's clock in virtual time.
//
// Note [Virtual time]
// A discrete-event simulation without threads. The host has one clock, which only the host's own
// doings move: fixed costs per call, and waiting. What it issues is queued on streams with the time
// of issue. The queues are played when somebody asks. A query plays them up to the host's time. A
// synchronisation plays them until the thing waited for has ended, and the host's clock then
// follows.
//
// Time on a link is never given out in the order of issue: a copy that was issued early but waits
// for a mark does not delay the others. Whatever is active on a resource shares it alike.
//
// Two users: the simulated accelerator (sim/machine.h), which also computes, and the rehearsal of a
// step (rehearsal/rehearsal.h), which only wants to know the times.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace distorch {

using Time = double;  // seconds

inline constexpr Time kNever = std::numeric_limits<Time>::infinity();

// A point in a stream's work: reached or not, and when.
struct Mark {
  virtual ~Mark() = default;
  uint64_t epoch = 0;             // of the clock
  std::atomic<bool> done{false};  // guarded as the VirtualTime is, but for a look from outside
  Time time = 0;
};
using MarkPtr = std::shared_ptr<Mark>;

// One piece of work on a stream.
struct VirtualTask {
  std::string label;
  int resource = -1;  // -1 takes no time
  double amount = 0;  // in the unit of the resource's rate
  std::function<void()> start;
  std::function<void()> end;
};

// What ran, and on which stream and resource.
struct VirtualSpan {
  Time start, end;
  int stream;
  std::string resource, label;
  double amount;
};

// Not thread-safe: its owner has a mutex, or one thread.
class VirtualTime {
 public:
  // Several links that share one capacity belong to one group. `rate` is per second.
  int add_group(double rate);
  int add_resource(std::string name, double rate, Time latency = 0, int group = -1);
  // REQUIRES: nothing is queued.
  void forget_resources();
  const std::string& name_of(int resource) const {
    return resources_[static_cast<size_t>(resource)].name;
  }
  int add_stream();
  size_t streams() const { return streams_.size(); }

  Time host() const { return host_; }
  void host_works(Time seconds) { host_ += seconds; }

  void issue(int stream, VirtualTask task);
  void record(int stream, const MarkPtr& mark);
  void wait(int stream, const MarkPtr& mark);
  bool idle(int stream) const { return streams_[static_cast<size_t>(stream)].queue.empty(); }

  // Plays what happens until the host's time.
  void play_to_host();
  // Plays until the mark is reached; the host waits for it.
  void await(const MarkPtr& mark);
  // Plays all; the host waits for it.
  void await_all();
  // The clocks begin anew, with no spans. What is queued is played first. Marks from before belong
  // to another epoch, and nobody waits for them any more.
  void reset();

  std::vector<VirtualSpan>& spans() { return spans_; }
  // A resource (or every one, -1) runs at 1 / factor between two times.
  void slow(int resource, double factor, Time start, Time end);
  // What a task has thrown since the last call; null: nothing.
  std::exception_ptr take_failure() { return std::exchange(failure_, nullptr); }

 private:
  struct Item {
    enum class Kind { kTask, kRecord, kWait } kind;
    Time issued;
    VirtualTask task;
    MarkPtr mark;
  };
  struct Stream {
    std::deque<Item> queue;
    bool running = false;  // the front is
    Time started = 0;
    Time flows_from = 0;  // after its latency
    double left = 0;
  };
  struct Resource {
    std::string name;
    double rate;
    Time latency;
    int group;
  };
  struct Slow {
    int resource;
    double factor;
    Time start, end;
  };

  void queue(int stream, Item item);
  template <class Reached>
  void run_until(Time limit, const Reached& reached);
  bool start_ready();
  void begin(size_t index);
  void finish(size_t index);
  void attempt(const std::function<void()>& action);
  Time next_event();
  double rate_of(const Stream& stream) const;
  double slowed(int resource) const;

  std::vector<Resource> resources_;
  std::vector<double> group_rates_;
  std::deque<Stream> streams_;
  std::set<size_t> busy_;                    // indices of streams with a queue
  std::vector<int> on_resource_, in_group_;  // how many tasks flow there now
  std::vector<VirtualSpan> spans_;
  std::vector<Slow> slow_;
  uint64_t epoch_ = 0;  // counts resets
  Time host_ = 0;
  Time played_ = 0;  // the queues were played up to here
  std::exception_ptr failure_;
};

}  // namespace distorch
