// SPDX-License-Identifier: Apache-2.0
#include "engine/slot_cache.h"

#include <algorithm>
#include <exception>

#include "engine/weight.h"

namespace distorch {
namespace {

// With more slots than this, weights are small beside the ring, and eviction alone finds rooms.
constexpr size_t kFewSlots = 48;
constexpr uint64_t kJustUsed = 8;  // of the clock, within which an operator lets go of its weights
constexpr ptrdiff_t kGrowing = 2;  // slots of a window that may wait for a part of their room

}  // namespace

// --- From a new slot to the operators ---

bool SlotCache::place(Slot& slot, const Window* ahead, Counters& counters) {
  if (slot.room_later > 0) expect_decoded(slot.room_later);
  if (slot.room_bytes == 0) return true;
  auto room = find_room({slot.room_bytes, ahead != nullptr, ahead, /*stored=*/slot.room_later > 0});
  if (room == nullptr && ahead != nullptr) return false;
  place_in(slot, std::move(room), slot.room_bytes, counters);
  return true;
}

void SlotCache::place_decoded(Slot& slot, const Window& window, Counters& counters) {
  const uint64_t bytes = slot.room_later;
  auto room = find_room({bytes, /*ahead=*/false, &window, /*stored=*/false});
  if (room == nullptr && lean_ == 0 && bytes <= capacity_) {
    expect_decoded(std::min(spare_ + bytes, capacity_ / 2));
  }
  place_in(slot, std::move(room), bytes, counters);
}

// `room`: null takes ordinary memory.
void SlotCache::place_in(Slot& slot, std::shared_ptr<Room> room, uint64_t bytes,
                         Counters& counters) {
  if (room != nullptr) {
    transfer_.place(slot, room->data(), room);
  } else {
    const std::shared_ptr<std::byte> ordinary = ordinary_memory(bytes);
    transfer_.place(slot, ordinary.get(), ordinary);
    if (!slot.overflow) counters.overflows.fetch_add(1, std::memory_order_relaxed);
  }
  slot.overflow = room == nullptr;
  slot.room = std::move(room);
}

void SlotCache::enter(const SlotPtr& slot, Weight& weight) {
  slot->in_list = slots_.insert(slots_.end(), slot);
  slot->weight = &weight;
  weight.in_ring.slot = slot;
}

std::shared_ptr<void> SlotCache::hand_out(const SlotPtr& slot) {
  std::shared_ptr<void> bytes = slot->wrapped;
  slot->used_at = forecast_.clock();
  if (slot->overflow) {
    drop(slot);
  } else if (slot->in_cache()) {
    slots_.splice(slots_.end(), slots_, slot->in_list);  // most recently used
  }
  return bytes;
}

void SlotCache::drop(const SlotPtr& slot) {
  if (!slot->in_cache()) return;
  const SlotPtr kept = slot;  // `slot` may be a reference to what is erased here
  mutex_.assert_held();
  mutex_.let_go(kept->source);
  kept->weight->in_ring.slot.reset();
  kept->weight = nullptr;
  slots_.erase(kept->in_list);
  std::erase(growing_, kept);
  if (transfer_.dropped(*kept)) {
    kept->wrapped.reset();
    kept->room.reset();
  }
}

// --- Looking ahead ---

bool SlotCache::grow(const SlotPtr& slot) {
  if (slot->whole()) return true;
  for (const Range& piece : slot->room->missing()) evict_from(piece, *slot);
  try {
    for (const Range& part : slot->room->take()) transfer_.grew(slot, part);
  } catch (...) {  // nobody would ask for that part again
    drop(slot);
    throw;
  }
  return slot->whole();
}

void SlotCache::grow_all() {
  drop_broken_promises();
  for (size_t i = 0; i < growing_.size(); ++i) grow(SlotPtr(growing_[i]));
  std::erase_if(growing_, [](const SlotPtr& slot) { return slot->whole(); });
}

// Nobody wants these any more, or they have failed.
void SlotCache::drop_broken_promises() {
  const auto is_broken = [](const SlotPtr& slot) {
    const bool wanted = slot->weight->in_ring.outlook->wanted > 0;
    return !slot->whole() && (!wanted || slot->state == Slot::State::kFailed);
  };
  for (;;) {
    const auto broken = std::find_if(growing_.begin(), growing_.end(), is_broken);
    if (broken == growing_.end()) return;
    drop(*broken);
  }
}

bool SlotCache::may_promise(const Window& window) const {
  const auto grows_for_it = [&](const SlotPtr& slot) {
    return !slot->whole() && Forecast::wants(window, slot->weight->id());
  };
  return std::count_if(growing_.begin(), growing_.end(), grows_for_it) < kGrowing;
}

void SlotCache::grow_later(const SlotPtr& slot) {
  if (!slot->whole()) growing_.push_back(slot);
}

bool SlotCache::may_stay(const Slot& slot) const {
  if (spare_ == 0 || slot.cheap || region_ == nullptr) return true;
  const bool decoded = slot.data != nullptr;
  if (decoded && slot.room != nullptr) {
    const Range range = slot.room->range();
    if (range.end - range.begin <= large()) return true;
  }
  // If the slot is used again, its own decoded bytes need room as well.
  return region_->arena()->has_hole(spare_ + (decoded ? 0 : slot.room_later));
}

// So many bytes are decoded at once. Looking ahead leaves that room, up to half of the ring.
void SlotCache::expect_decoded(uint64_t room) {
  if (room <= large() || room > capacity_) return;  // the latter find no room anyway
  spare_ = std::max(spare_, std::min(room, capacity_ / 2));
}

// --- Rooms ---

// Null: there is none in the ring.
std::shared_ptr<Room> SlotCache::find_room(const Wanted& wanted) {
  if (lean_ > 0) return nullptr;
  try {
    return wanted.ahead ? find_room_ahead(wanted) : find_room_now(wanted);
  } catch (const std::exception&) {
    // The device has no room for the ring itself. It is not asked again at every fetch: each time
    // PyTorch would empty its cache first, and wait for the device.
    lean_ = forecast_.weights() + 1;
    return nullptr;
  }
}

std::shared_ptr<Room> SlotCache::find_room_ahead(const Wanted& wanted) {
  if (wanted.bytes + spare_ > capacity_) return nullptr;  // evicting would not help
  if (transfer_.in_parts() && slots_.size() <= kFewSlots) {
    return promised_room(wanted.bytes, *wanted.window);
  }
  return carve_or_evict(wanted.bytes, spare_ > 0 ? std::optional(spare_) : std::nullopt);
}

std::shared_ptr<Room> SlotCache::find_room_now(const Wanted& wanted) {
  const uint64_t bytes = wanted.bytes;
  if (bytes > capacity_) return nullptr;
  drop_broken_promises();
  // Bytes that get another room when they are decoded lie at the end of the ring.
  std::optional<uint64_t> spare;
  if (wanted.stored && spare_ > 0) spare = bytes + spare_ <= capacity_ ? spare_ : 0;
  if (auto room = carve_or_evict(bytes, spare)) return room;
  if (wanted.stored) {  // better without that hole than outside the ring
    spare = 0;
    if (auto room = carve(bytes, spare)) return room;
  }
  // Threads that went away may still have predictions that hold room.
  forecast_.forget_others(wanted.window);
  return evict_one() ? carve_or_evict(bytes, spare) : nullptr;
}

// Evicts what nothing needs, one by one, until there is room. Null: that did not help.
std::shared_ptr<Room> SlotCache::carve_or_evict(uint64_t bytes, std::optional<uint64_t> spare) {
  do {
    if (auto room = carve(bytes, spare)) return room;
  } while (evict_one());
  return nullptr;
}

std::shared_ptr<Region> SlotCache::region() {
  if (region_ == nullptr) {
    region_ =
        std::make_shared<Region>(transfer_.allocate(capacity_), capacity_, transfer_.granule());
  }
  return region_;
}

// `spare` null: the lowest hole that fits. Else the highest place that leaves a hole of so many
// bytes; 0 asks for no hole.
std::shared_ptr<Room> SlotCache::carve(uint64_t bytes, std::optional<uint64_t> spare) {
  const auto arena = region()->arena();
  const auto offset = spare ? arena->allocate_last(bytes, *spare) : arena->allocate(bytes);
  if (!offset) return nullptr;
  try {
    return Room::taken(region_, {*offset, *offset + bytes});
  } catch (...) {  // nobody else knows of it
    arena->free(*offset, bytes);
    throw;
  }
}

// Chooses a range and takes nothing yet. grow() evicts what lies there, and takes each part as it
// becomes free: see Note [Rooms that become free by and by]. If some hole is large enough, only
// holes count as free. A small weight takes the lowest hole, so that neighbours travel as one copy.
std::shared_ptr<Room> SlotCache::promised_room(uint64_t bytes, const Window& window) {
  if (bytes <= large()) {
    if (auto room = carve(bytes, std::nullopt)) return room;
  }
  const std::vector<Range> holes = region()->arena()->holes();
  const bool fits = std::any_of(holes.begin(), holes.end(),
                                [&](const Range& hole) { return hole.end - hole.begin >= bytes; });
  const std::vector<Occupied> taken = occupied(window, holes, fits);
  const auto offset = choose_offset(taken, region_->capacity(), bytes);
  if (!offset) return nullptr;
  return std::make_shared<Room>(region_, Range{*offset, *offset + bytes});
}

// What lies in the region, in the eyes of a window that looks ahead.
std::vector<Occupied> SlotCache::occupied(const Window& window, const std::vector<Range>& holes,
                                          bool holes_only) const {
  std::vector<Occupied> found;
  std::vector<Range> known = holes;
  for (const SlotPtr& slot : slots_) {
    if (slot->room == nullptr || slot->room->region() != region_.get()) continue;
    uint64_t after = free_after(*slot, window);
    if (after == 0 && holes_only) after = kNotKnown;
    known.push_back(slot->room->range());
    if (after > 0) found.push_back({slot->room->range(), after});
  }
  // The rest is held by operators whose weights have let go of it.
  std::sort(known.begin(), known.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  known.push_back({region_->capacity(), region_->capacity()});
  uint64_t end = 0;
  for (const Range& range : known) {
    if (range.begin > end) found.push_back({{end, range.begin}, kNotKnown});
    end = std::max(end, range.end);
  }
  return found;
}

// Uses from now until the slot can be evicted; 0: now.
uint64_t SlotCache::free_after(const Slot& slot, const Window& window) const {
  const uint64_t done = forecast_.uses_until_done(window, slot.weight->id());
  if (done == kNotKnown) return done;
  if (done > 0) return done + 1;  // an operator lets go when the next one is issued
  if (evictable(slot)) return 0;
  const bool soon =
      slot.weight->id() == window.latest || forecast_.clock() - slot.used_at <= kJustUsed;
  return soon ? 1 : kNotKnown;
}

// --- Eviction ---

// Whether nothing needs the slot and its memory can be used again.
bool SlotCache::evictable(const Slot& slot) const {
  if (slot.wrapped == nullptr) return false;  // it has no memory
  if (!slot.cheap && slot.weight->in_ring.outlook->wanted > 0) return false;
  if (!slot.whole()) return true;  // nobody waits for a slot that is still growing
  return slot.state != Slot::State::kLoading && !transfer_.in_use(slot);
}

void SlotCache::evict_from(Range range, const Slot& but) {
  drop_if([&](const Slot& slot) {
    if (slot.room == nullptr || &slot == &but || !evictable(slot)) return false;
    const Range held = slot.room->range();
    return held.begin < range.end && range.begin < held.end;
  });
}

// The least recently used slot of those that can go. False: there is none.
bool SlotCache::evict_one() {
  const auto found = std::find_if(slots_.begin(), slots_.end(),
                                  [this](const SlotPtr& slot) { return evictable(*slot); });
  if (found == slots_.end()) return false;
  drop(*found);
  return true;
}

// --- The memory itself ---

void SlotCache::resize(uint64_t capacity) {
  spare_ = 0;  // may have been learned from weights that are gone
  capacity = round_up(capacity, kPage);
  if (capacity == capacity_) return;
  let_go_of_region();
  capacity_ = capacity;
}

void SlotCache::give_back() {
  lean_ = forecast_.weights() + 1;  // the fetch that begins next counts down first
  let_go_of_region();
}

// Slots of it live on until their last holder lets go.
void SlotCache::let_go_of_region() {
  while (!slots_.empty()) drop(slots_.front());
  forecast_.forget_all();
  region_.reset();
}

std::shared_ptr<std::byte> SlotCache::ordinary_memory(uint64_t bytes) {
  try {
    return transfer_.allocate(bytes);
  } catch (const std::exception&) {
    if (region_ == nullptr) throw;
  }
  let_go_of_region();
  return transfer_.allocate(bytes);
}

}  // namespace distorch
