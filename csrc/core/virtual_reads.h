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

// A disk whose time is virtual. The simulator's is in another library.
class ReadClock {
 public:
  virtual ~ReadClock() = default;
  virtual void* begin(uint64_t bytes, bool urgent) = 0;  // issues a read
  virtual bool ended(void* read) = 0;                    // at the host's present time
  virtual void wait(void* read) = 0;                     // moves the host's time to its end
  virtual void forget(void* read) = 0;                   // every read, once
};

class VirtualReads : public Executor {
 public:
  explicit VirtualReads(ReadClock& clock) : clock_(clock) {}

  void submit(std::vector<Task> tasks, Urgency urgency) override;
  void start_afresh() override;
  void catch_up() override;
  bool run_next() override;

 private:
  struct Forget {
    ReadClock* clock;
    void operator()(void* read) const { clock->forget(read); }
  };
  struct Read {
    std::unique_ptr<void, Forget> ticket;
    Task task;
  };

  std::optional<Read> take_first(bool ended);

  ReadClock& clock_;
  Mutex mutex_;
  std::deque<Read> reads_ GUARDED_BY(mutex_);
};

// Reads for rings of devices of this type ("sim") go by that clock, from now on.
// `clock` stays valid.
void set_read_clock(const std::string& device_type, ReadClock* clock);
// Null: none was set.
ReadClock* read_clock(const std::string& device_type);

}  // namespace distorch
