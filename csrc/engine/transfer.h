// SPDX-License-Identifier: Apache-2.0
// How bytes get from donors to slots, on one kind of device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "core/executor.h"
#include "core/file.h"
#include "engine/ring_mutex.h"
#include "engine/slot.h"

namespace distorch {

class Reads;
struct Counters;

// A ring has one Transfer. It calls all but recording() with the ring's mutex held. Nobody else
// changes the state of a slot. A slot's way, in the order of the calls:
//   make_slot()  says how many bytes of memory it needs
//   place()      gives it an address; the room there may still be another slot's
//   grew()       for all of that room, or for each part of it that becomes free; also after
//   start().
//                Here a device asks for copies of what it reaches by itself.
//   start()      queues reads by the host of what it does not reach; was_read() when they have
//   ended issue()      queues copies and decoding on the device; slots are kReady then lend() the
//   current stream waits for the bytes dropped()    the cache has let go of it
// On the host there may be a second place(), for the decoded bytes, and decode() before lend().
class Transfer {
 public:
  virtual ~Transfer() = default;

  // --- Memory of the device ---
  // What rooms are rounded up to.
  virtual uint64_t granule() const { return kPage; }
  // Aligned to granule(). Throws what an allocation on this device throws.
  virtual std::shared_ptr<std::byte> allocate(uint64_t bytes) = 0;
  // Whether operators hold what is wrapped in `slot`.
  virtual bool in_use(const Slot& slot) const = 0;
  // Whether slots may be filled part by part.
  virtual bool in_parts() const { return false; }
  // Whether what this thread issues now is recorded, to run later and more than once. That is no
  // place for a fetch. Called without the mutex.
  virtual bool recording() const { return false; }

  // Whether anything of a weight with this source can be brought before somebody asks for it. Not
  // if operators use the donor's own memory: a forecast that was made before the weight moved there
  // may name it. Called with the weight's mutex held: it waits for nothing, and keeps nothing.
  virtual bool brings_ahead(const Source&) const { return true; }

  // --- A slot's way ---
  // `large`: decoded weights of more bytes get their room when somebody asks for them.
  virtual SlotPtr make_slot(const std::string& name, Source source, uint64_t large) = 0;
  // Lays the slot out over `memory`, and makes `slot.wrapped`, which keeps `block` alive. The first
  // call gives Slot::room_bytes. If Slot::room_later is not 0, a second call gives that many, while
  // the slot is kStored: it is decoded next. Changes nothing if it throws.
  virtual void place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) = 0;
  // Throws where readers cannot be asked; the slot is then dropped.
  virtual void start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) = 0;
  // Readers have read all they were asked for, or have failed. The slot may have left the cache
  // meanwhile, and somebody may still wait for it. On the host it has its bytes. On a device, which
  // has not copied them, it fails without a reason.
  virtual void was_read(const SlotPtr& slot, std::optional<Failure> failure) = 0;
  // The bytes [part.begin, part.end) of the slot's room are its own now. What used them before may
  // still be at work on the device.
  virtual void grew(const SlotPtr& slot, Range part) = 0;
  // Hands to the device what was asked for since the last call, and what readers have brought.
  // Slots whose room is whole are then ready, or have failed. False: there was nothing to do.
  // Throws the device's own error where it takes no work any more; all these slots have failed
  // then.
  virtual bool issue() { return false; }
  // On the host: all rows of a slot that is kStored, by the calling thread. It gives the lock up
  // meanwhile.
  virtual void decode(Slot&, RingMutex::Lock&) {}
  // Operators that this thread issues from now on find the bytes. The time that they wait counts.
  virtual void lend(Slot&, Counters&) {}
  // The host is about to wait for the slot. True: the device knows how long operators wait.
  virtual bool times_wait(Slot&) { return false; }
  // The cache has let go of the slot, whatever is on its way to it. True: its room can be used for
  // something else at once, because nothing was asked to write there.
  virtual bool dropped(Slot&) { return false; }

 protected:
  // Without a reason, whoever waits for the slot asks for the weight again.
  static void fail(Slot& slot, std::optional<Failure> failure = std::nullopt) {
    slot.state = Slot::State::kFailed;
    slot.failure = std::move(failure);
  }
};

}  // namespace distorch
