// SPDX-License-Identifier: Apache-2.0
// The weights that lie in a ring: which of them, in which of its rooms, and what makes room.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "engine/forecast.h"
#include "engine/ring_mutex.h"
#include "engine/room.h"
#include "engine/slot.h"
#include "engine/transfer.h"

namespace distorch {

// A ring has one cache, and guards it with its mutex.
//
// Note [What the cache promises]
// * Slots never hold more bytes than the capacity. A fetch that finds no room takes ordinary memory
//   of the device and gives it back after use, since an operator waits for it now. So there is
//   nothing to dead-lock on. If the device has no memory left, the cache gives up its own first.
// * Memory is used again only when no operator holds it. A room may be promised to a weight before
//   that; Note [Rooms that become free by and by].
// * Predictions decide what is fetched early and what is thrown out, and nothing else. A wrong one
//   costs a read.
class SlotCache {
 public:
  using Window = Forecast::Window;

  SlotCache(Transfer& transfer, Forecast& forecast, RingMutex& mutex)
      : transfer_(transfer), forecast_(forecast), mutex_(mutex) {}

  uint64_t capacity() const { return capacity_; }
  uint64_t used() const { return region_ ? region_->arena()->used() : 0; }
  // Another capacity lets go of all slots. In any case, what was learned of decoded weights is
  // forgotten: these weights may be gone.
  void resize(uint64_t capacity);
  // Lets go of all slots and of their memory. Fetches take ordinary memory for about one step: as
  // many as there are weights.
  void give_back();
  void a_fetch_begins() {
    if (lean_ > 0) --lean_;
  }
  // Larger decoded weights get their room when they are decoded. See Note [Who decodes].
  uint64_t large() const { return capacity_ / kSmall; }

  // --- From a new slot to the operators ---
  // The slot gets its first memory. Somebody waits for it (`ahead` is null), or the window `ahead`
  // prepares for a use: then it may get no more than the promise of a room. False: there is no room
  // for that. A slot that needs no memory yet has nothing to wait for. Throws what an allocation
  // throws.
  bool place(Slot& slot, const Window* ahead, Counters& counters);
  // The weight has the slot from now on.
  void enter(const SlotPtr& slot, Weight& weight);
  // Memory for what is decoded now. What was read ahead stays: where it has left no room, ordinary
  // memory is taken, and looking ahead leaves more room the next time. REQUIRES: the caller holds
  // `slot.wrapped`, the bytes that are decoded.
  void place_decoded(Slot& slot, const Window& window, Counters& counters);
  // What operators hold.
  std::shared_ptr<void> hand_out(const SlotPtr& slot);
  // The slot is not the weight's any more, and its room goes to others when nobody holds it.
  void drop(const SlotPtr& slot);
  template <class Condition>
  void drop_if(const Condition& condition) {
    for (auto next = slots_.begin(); next != slots_.end();) {
      const SlotPtr& slot = *next++;
      if (condition(std::as_const(*slot))) drop(slot);
    }
  }

  // --- Looking ahead ---
  // Takes what has become free of a slot's room, and tells the Transfer. True: the room is whole.
  bool grow(const SlotPtr& slot);
  // The same for all slots that were promised a room and are still wanted.
  void grow_all();
  // Whether the window may prepare for one more use. False while two weights in its queue still
  // wait for parts of their room.
  bool may_promise(const Window& window) const;
  // `slot` was made ahead. If its room is not whole, grow_all() goes on with it.
  void grow_later(const SlotPtr& slot);
  // Whether the ring keeps its hole for decoded bytes if the slot stays for one more use.
  bool may_stay(const Slot& slot) const;

 private:
  static constexpr uint64_t kSmall = 16;  // parts of the ring: a weight of no more is small

  // What find_room() is asked for.
  struct Wanted {
    uint64_t bytes;
    bool ahead;  // nobody waits for it
    // Ahead: the window that prepares. Else: whose predictions are kept, if others must be
    // forgotten to make room; null: nobody's.
    const Window* window;
    bool stored;  // bytes that get another room when they are decoded
  };
  std::shared_ptr<Room> find_room(const Wanted& wanted);
  std::shared_ptr<Room> find_room_ahead(const Wanted& wanted);
  std::shared_ptr<Room> find_room_now(const Wanted& wanted);
  std::shared_ptr<Room> carve_or_evict(uint64_t bytes, std::optional<uint64_t> spare);
  std::shared_ptr<Room> promised_room(uint64_t bytes, const Window& window);
  std::shared_ptr<Room> carve(uint64_t bytes, std::optional<uint64_t> spare);
  std::shared_ptr<Region> region();
  std::vector<Occupied> occupied(const Window& window, const std::vector<Range>& holes,
                                 bool holes_only) const;
  uint64_t free_after(const Slot& slot, const Window& window) const;
  void place_in(Slot& slot, std::shared_ptr<Room> room, uint64_t bytes, Counters& counters);
  std::shared_ptr<std::byte> ordinary_memory(uint64_t bytes);
  void expect_decoded(uint64_t room);
  bool evictable(const Slot& slot) const;
  bool evict_one();
  void evict_from(Range range, const Slot& but);
  void drop_broken_promises();
  void let_go_of_region();

  Transfer& transfer_;
  Forecast& forecast_;
  RingMutex& mutex_;
  std::shared_ptr<Region> region_;  // null: not allocated yet
  uint64_t capacity_ = 0;
  // Bytes that looking ahead leaves free; see Note [Who decodes]. Always 0 on accelerators.
  uint64_t spare_ = 0;
  size_t lean_ = 0;               // fetches until the ring takes memory again
  std::list<SlotPtr> slots_;      // the least recently used first
  std::vector<SlotPtr> growing_;  // that were promised a room, in order
};

}  // namespace distorch
