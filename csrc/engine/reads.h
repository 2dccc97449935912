// SPDX-License-Identifier: Apache-2.0
// Reads a donor's bytes to host memory, on reader threads or on a thread that waits.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <utility>

#include "core/executor.h"
#include "engine/ring_mutex.h"
#include "engine/slot.h"
#include "engine/transfer.h"

namespace distorch {

// Reads for the slots of one ring. Who does them is the Executor's affair: threads, or whoever
// notices that their virtual time has come.
class Reads {
 public:
  Reads(RingMutex& mutex, std::unique_ptr<Executor> readers)
      : mutex_(mutex), readers_(std::move(readers)) {}

  // Reads all bytes of the slot's donor to `into`, which stays valid as long as the slot. The
  // rest of its first page and of its last page may be overwritten. At the end `transfer` is told,
  // with the mutex held. REQUIRES: the mutex is held. Throws where no task can be queued.
  void queue(Transfer& transfer, const SlotPtr& slot, std::byte* into, Executor::Urgency urgency);

  // Somebody waits for a read.
  void hurry() { readers_->hurry(); }
  // Ends the reads whose time has come. REQUIRES: the mutex is not held.
  void catch_up() { readers_->catch_up(); }
  // Does the next read on this thread, with the lock given up. False: there is none to do.
  bool run_next(RingMutex::Lock& lock) {
    const RingMutex::Unlocked other_threads_go_on(lock);
    return readers_->run_next();
  }
  // In a forked child: what was asked for is forgotten.
  void start_afresh() { readers_->start_afresh(); }

 private:
  struct Whole;
  void end_part(Whole& whole, std::optional<Failure> failure);

  RingMutex& mutex_;
  // Last, so that its threads end before what they use.
  const std::unique_ptr<Executor> readers_;
};

}  // namespace distorch
