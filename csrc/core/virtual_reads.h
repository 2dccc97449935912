// SPDX-License-Identifier: Apache-2.0
// File reads that take a simulator's time. See Note [Reads in virtual time].
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/executor.h"
#include "core/mutex.h"

namespace distorch {

// A simulator's disk, from another library: plain functions.
struct ReadClock {
  void* (*begin)(uint64_t bytes, bool urgent);  // issues a read
  bool (*ended)(void* read);                    // at the host's present time
  void (*wait)(void* read);                     // moves the host's time to its end
  void (*forget)(void* read);                   // every read, once
};

class VirtualReads : public Executor {
 public:
  explicit VirtualReads(const ReadClock& clock) : clock_(clock) {}

  void submit(std::vector<Task> tasks, Urgency urgency) override;
  void start_afresh() override;
  void catch_up() override;
  bool run_next() override;

 private:
  struct Read {
    std::unique_ptr<void, void (*)(void*)> ticket;
    Task task;
  };

  std::optional<Read> take_first(bool ended);

  const ReadClock& clock_;
  Mutex mutex_;
  std::deque<Read> reads_ GUARDED_BY(mutex_);
};

// Reads for rings of devices of this type ("sim") go by that clock, from now on.
// `clock` stays valid.
void set_read_clock(const std::string& device_type, const ReadClock* clock);
// Null: none was set.
const ReadClock* read_clock(const std::string& device_type);

}  // namespace distorch
