// SPDX-License-Identifier: Apache-2.0
// Ring: bounded memory on a compute device in which fetched weights lie, and the look-ahead that
// keeps it full.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "core/executor.h"
#include "core/mutex.h"
#include "engine/forecast.h"
#include "engine/reads.h"
#include "engine/ring_mutex.h"
#include "engine/slot_cache.h"
#include "engine/transfer.h"
#include "engine/weight.h"

namespace distorch {

// Note [A weight's way to an operator]
// A ring has three parts.
// * Forecast says which weights come next. It knows numbers alone.
// * SlotCache decides which weights lie in the ring, and where. It asks the forecast who is wanted,
//   and the transfer for memory.
// * Transfer brings the bytes, in the way of its kind of device: HostTransfer or Accelerator. It
//   alone changes the state of a slot. Reads are the reader tasks that it may ask for.
// The ring itself takes the mutex, calls the three in their order, and waits.
//
// acquire() is what the hook calls. It finds the weight's slot or has one made (load), prepares for
// the coming uses (look_ahead), and waits until the slot is ready (wait_for). On the host it
// decodes what is only stored (decode). Then it lends the slot to the current stream, and hands it
// out.
//
// From a disk to a GPU:
// * Ring::load calls Accelerator::make_slot, which takes a pinned buffer; SlotCache::place and
//   enter; SlotCache::grow, which tells Accelerator::grew; and Accelerator::start, which asks for
//   Reads::queue.
// * When the last part was read, Reads::end_part calls Accelerator::was_read.
// * The thread that waits in Ring::wait_for calls Accelerator::issue. It issues the copy and then
//   queue_decoding: RowDecoder::decode_on_device and decode_on_cuda. Ring::decode takes no part.
// * Then Accelerator::lend and SlotCache::hand_out.
//
// From a disk on the host:
// * Ring::load calls HostTransfer::make_slot, SlotCache::place and enter, and HostTransfer::start,
//   which asks for Reads::queue.
// * When the last part was read, Reads::end_part calls HostTransfer::was_read.
// * Ring::decode has HostDevice::decode_all do its work. Then SlotCache::hand_out.
class Ring {
 public:
  // `transfer` is of the compute device; `readers` do what it asks of the host.
  Ring(std::unique_ptr<Transfer> transfer, std::unique_ptr<Executor> readers);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // What operators hold of `weight` on the compute device: its bytes, brought now if they are not
  // there. Blocks. Throws Error(kFetch), which names the weight and its donor.
  std::shared_ptr<void> acquire(Weight& weight);
  // Throws Error(kFetch) where a fetch would be recorded instead of done.
  void refuse_recording(const Weight& weight) const;

  // An operator has been issued and let its weights go. Their room is free for what comes next,
  // behind that operator and no other.
  void released();

  // An operator wrote to the fetched bytes of `weight` at `data`. Any other copy of it is stale.
  void written(Weight& weight, const std::byte* data);

  // Around a write to the bytes of a weight on its donor. Until it ends, the weight is not brought
  // ahead of its use: old and new bytes would come mixed. The donor knows the copies that were
  // asked for before, and waits for them. (Another weight on the same donor does not know of the
  // write.)
  class Write {
   public:
    Write(Ring& ring, Weight& weight);
    ~Write();
    Write(const Write&) = delete;
    Write& operator=(const Write&) = delete;

   private:
    Ring& ring_;
    Weight& weight_;
  };

  // While nothing was learned, `next` is taken to follow `weight`.
  void suggest(Weight& weight, uint64_t next);

  // Bytes of look-ahead. Several holders (models) share one ring: the largest
  // reservation counts. Returns a ticket for release().
  uint64_t reserve(uint64_t bytes);
  void release(uint64_t ticket);
  // Bytes that the others keep reserved: all but that ticket.
  uint64_t reserved_beside(uint64_t ticket) const;

  // The device is short of memory. All that no operator holds goes back to it. For about one step,
  // weights are fetched into ordinary memory, without look-ahead.
  void give_back();

  uint64_t capacity() const;
  uint64_t used() const;

  // In a forked child. Forgets what was on its way: the threads that carried it are not there.
  void start_afresh();

  // Called by Weight only.
  void enlist(Weight& weight);
  void delist(Weight& weight);

 private:
  using Lock = RingMutex::Lock;
  struct IssueAtEnd;
  struct Waiter;

  bool recording() const;
  SlotPtr usable_slot(Weight& weight) REQUIRES(mutex_);
  SlotPtr load(Weight& weight, const Forecast::Window* ahead) REQUIRES(mutex_);
  void look_ahead(Forecast::Window& window) REQUIRES(mutex_);
  bool bring_ahead(Weight& weight, const Forecast::Window& window) REQUIRES(mutex_);
  void issue() REQUIRES(mutex_);
  void wait_for(Slot& slot, Counters& counters, Lock& lock) REQUIRES(mutex_);
  void decode(const SlotPtr& slot, Counters& counters, Lock& lock) REQUIRES(mutex_);
  void resize() REQUIRES(mutex_);
  uint64_t largest_but(uint64_t ticket) const REQUIRES(mutex_);  // 0: no ticket has that number

  mutable RingMutex mutex_;
  const std::unique_ptr<Transfer> transfer_ PT_GUARDED_BY(mutex_);
  Forecast forecast_ GUARDED_BY(mutex_);
  SlotCache cache_ GUARDED_BY(mutex_);
  std::unordered_map<uint64_t, Weight*> weights_ GUARDED_BY(mutex_);        // by id
  std::unordered_map<uint64_t, uint64_t> reservations_ GUARDED_BY(mutex_);  // ticket -> bytes
  uint64_t next_ticket_ GUARDED_BY(mutex_) = 1;
  // Last, so that its threads end before what they use.
  Reads reads_;
};

}  // namespace distorch
