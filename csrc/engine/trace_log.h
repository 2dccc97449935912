// SPDX-License-Identifier: Apache-2.0
// What happened when, while somebody traces: copies, stalls, operators.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "core/mutex.h"

namespace distorch {

// One interval, in seconds since the trace began.
struct TraceSpan {
  std::string track, name;
  double start, end;
  uint64_t bytes;
};

class TraceLog {
 public:
  // The one log of this process. It costs one atomic load while nobody traces.
  static TraceLog& instance();

  bool active() const { return active_.load(std::memory_order_relaxed) && !quiet_; }

  // What this thread does meanwhile is in no trace: a rehearsal runs code that notes its work.
  class Quiet {
   public:
    Quiet() { quiet_ = true; }
    ~Quiet() { quiet_ = false; }
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;
  };

  void start();
  // Ends the trace; resolves what devices knew.
  std::vector<TraceSpan> stop();

  // Seconds on the host's clock since start().
  double now() const;
  void add(TraceSpan span);
  // A span that only its device can time, and only when its work is done.
  void add_later(std::function<TraceSpan()> resolve);

 private:
  static inline thread_local bool quiet_ = false;
  std::atomic<bool> active_{false};
  mutable Mutex mutex_;
  std::chrono::steady_clock::time_point begin_ GUARDED_BY(mutex_);
  std::vector<TraceSpan> spans_ GUARDED_BY(mutex_);
  std::vector<std::function<TraceSpan()>> pending_ GUARDED_BY(mutex_);
};

// An interval of the host's own time, if a trace is on.
class HostSpan {
 public:
  HostSpan(const char* track, std::string name, uint64_t bytes = 0)
      : track_(track), on_(TraceLog::instance().active()) {
    if (!on_) return;
    name_ = std::move(name);
    bytes_ = bytes;
    start_ = TraceLog::instance().now();
  }
  ~HostSpan() {
    if (!on_) return;
    try {
      TraceLog& log = TraceLog::instance();
      log.add({track_, std::move(name_), start_, log.now(), bytes_});
    } catch (const std::bad_alloc&) {
      // There is no memory. The trace has one span less, and the work goes on.
    }
  }
  HostSpan(const HostSpan&) = delete;
  HostSpan& operator=(const HostSpan&) = delete;

 private:
  const char* const track_;
  const bool on_;
  std::string name_;
  uint64_t bytes_ = 0;
  double start_ = 0;
};

}  // namespace distorch
