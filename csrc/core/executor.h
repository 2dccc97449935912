// SPDX-License-Identifier: Apache-2.0
// Who does the host's blocking work (file reads) for a ring.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace distorch {

// Note [Reads in virtual time]
// In production reads are done by the threads of an IoPool. On the simulated
// accelerator a thread's time would mean nothing beside the virtual clock, so
// there the disk is one more resource of the machine (VirtualReads): a read is
// issued to it, and its bytes are read, really, by whoever notices that its
// virtual time is over: the ring's next call, or a caller that waits, whose
// clock then moves to the end of the read. Order and times are exact, and no
// thread takes part.
class Executor {
 public:
  enum class Urgency { kNow, kAhead };
  struct Task {
    std::function<void()> run;  // must not throw
    uint64_t bytes;             // that it reads
  };

  virtual ~Executor() = default;
  // kNow goes before everything that is not yet running; tasks of one call keep
  // their order. May be called with the ring's mutex held; runs no task.
  virtual void submit(std::vector<Task> tasks, Urgency urgency) = 0;
  // Somebody waits for a task.
  virtual void hurry() {}
  // In a forked child, before anything else: what was submitted is forgotten.
  virtual void start_afresh() = 0;

  // For executors without threads; called without the ring's mutex. Runs the
  // tasks whose time has come.
  virtual void catch_up() {}
  // Runs the next task, however long it takes. False: there is none, or threads
  // run them.
  virtual bool run_next() { return false; }
};

}  // namespace distorch
