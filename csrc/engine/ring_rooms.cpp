// The memory of a ring: what of it becomes whose, and what makes room.
#include <algorithm>
#include <exception>
#include <utility>

#include "engine/ring.h"

namespace distorch {
namespace {

constexpr size_t kFewSlots = 48;   // of more, none is so large that its room needs choosing
constexpr uint64_t kSmall = 16;    // parts of the ring: a weight of no more is small
constexpr uint64_t kJustUsed = 8;  // uses within which an operator lets go of its weights

}  // namespace

// Slots of it live on until their last holder lets go.
void Ring::let_go_of_region() {
  while (!slots_.empty()) drop(SlotPtr(slots_.front()));
  for (auto& [thread, window] : windows_) forget_predictions(window);
  region_.reset();
}

void Ring::resize() {
  uint64_t wanted = 0;
  for (const auto& [ticket, bytes] : reservations_) wanted = std::max(wanted, bytes);
  wanted = round_up(wanted, kPage);
  spare_ = 0;  // may have been learned from weights that are gone
  if (wanted == capacity_) return;
  let_go_of_region();
  capacity_ = wanted;
}

std::shared_ptr<std::byte> Ring::ordinary_memory(uint64_t bytes) {
  try {
    return device_->allocate(bytes);
  } catch (const std::exception&) {
    if (region_ == nullptr) throw;
  }
  let_go_of_region();
  return device_->allocate(bytes);
}

// Null: there is none in the ring.
std::shared_ptr<Room> Ring::find_room(uint64_t bytes, IoPool::Urgency urgency, const Window* window,
                                      bool aside) {
  if (lean_ > 0) return nullptr;
  const bool now = urgency == IoPool::Urgency::kNow;
  std::optional<uint64_t> spare;
  if (spare_ > 0 && (aside || !now)) spare = spare_;
  if (spare && bytes + *spare > capacity_) {  // evicting would not help
    if (!now) return nullptr;
    spare = 0;
  }
  try {
    if (bytes <= capacity_) {
      if (!now && device_->in_parts() && slots_.size() <= kFewSlots) {
        return promised_room(bytes, *window);
      }
      do {
        if (auto room = carve(bytes, spare)) return room;
      } while (evict_one());
    }
  } catch (const std::exception&) {
    // The device has no room for the ring itself. It is not asked again at every fetch: each time
    // PyTorch would empty its cache first, and wait for the device.
    lean_ = weights_.size() + 1;
    return nullptr;
  }
  if (!now) return nullptr;
  if (aside && bytes <= capacity_) {
    if (auto room = carve(bytes, 0)) return room;
  }
  // Threads that went away may still have predictions that hold room.
  for (auto& [thread, other] : windows_) {
    if (&other != window) forget_predictions(other);
  }
  while (bytes <= capacity_ && evict_one()) {
    if (auto room = carve(bytes, aside ? std::optional<uint64_t>(0) : std::nullopt)) return room;
  }
  return nullptr;
}

// For the decoded bytes. What was read ahead stays: where it has left no room,
// they take ordinary memory, and it leaves more the next time.
void Ring::room_to_decode(const SlotPtr& slot, const Window& window, Counters& counters) {
  const uint64_t bytes = slot->source.size();
  const uint64_t needed = room_for(bytes);
  const std::shared_ptr<Room> room = find_room(needed, IoPool::Urgency::kNow, &window, false);
  std::shared_ptr<void> block = room;
  std::byte* data = nullptr;
  if (room != nullptr) {
    data = room->data();
  } else {
    if (lean_ == 0 && needed <= capacity_) {
      expect_decoded(std::min(spare_ + needed, capacity_ / 2));
    }
    const std::shared_ptr<std::byte> ordinary = ordinary_memory(needed);
    data = ordinary.get();
    block = ordinary;
  }
  slot->wrapped = device_->wrap(*slot, data, bytes, std::move(block));
  slot->room = room;
  slot->data = data;
  slot->stored = nullptr;
  if (room == nullptr && !slot->overflow) {
    counters.overflows.fetch_add(1, std::memory_order_relaxed);
  }
  slot->overflow = room == nullptr;
}

// Whether so many decoded bytes are too much to have room ahead.
bool Ring::is_large(uint64_t room) const { return room > capacity_ / kSmall; }

// So many bytes are decoded at once: looking ahead leaves that room.
void Ring::expect_decoded(uint64_t room) {
  if (!is_large(room) || room > capacity_) return;  // the latter finds no room anyway
  spare_ = std::max(spare_, std::min(room, capacity_ / 2));
}

// Whether there is room for what is decoded next, if the slot is kept for another
// use: with its own decoded bytes, then.
bool Ring::may_stay(const Slot& slot) const {
  if (spare_ == 0 || slot.cheap || region_ == nullptr) return true;
  if (slot.data != nullptr && slot.room != nullptr) {
    const Range range = slot.room->range();
    if (!is_large(range.end - range.begin)) return true;
  }
  const uint64_t more = slot.data == nullptr ? room_for(slot.source.size()) : 0;
  return region_->arena.has_hole(spare_ + more);
}

uint64_t Ring::room_for(uint64_t bytes) const {
  return round_up(std::max<uint64_t>(bytes, 1), device_->granule());
}

std::shared_ptr<Region> Ring::region() {
  if (region_ == nullptr) {
    region_ = std::make_shared<Region>(device_->allocate(capacity_), capacity_, device_->granule());
  }
  return region_;
}

// `spare`: at the end, if a hole of so many bytes is left.
std::shared_ptr<Room> Ring::carve(uint64_t bytes, std::optional<uint64_t> spare) {
  Arena& arena = region()->arena;
  const auto offset = spare ? arena.allocate_last(bytes, *spare) : arena.allocate(bytes);
  if (!offset) return nullptr;
  return Room::taken(region_, {*offset, *offset + bytes});
}

// See Note [Rooms that become free by and by]. Nothing is evicted for a weight
// that fits into a hole, and small ones lie side by side, to travel together.
std::shared_ptr<Room> Ring::promised_room(uint64_t bytes, const Window& window) {
  if (bytes <= capacity_ / kSmall) {
    if (auto room = carve(bytes)) return room;
  }
  const std::vector<Range> holes = region()->arena.holes();
  const bool fits = std::any_of(holes.begin(), holes.end(),
                                [&](const Range& hole) { return hole.end - hole.begin >= bytes; });
  const std::vector<Occupied> taken = occupied(window, holes, fits);
  const auto offset = choose_offset(taken, region_->arena.capacity(), bytes);
  if (!offset) return nullptr;
  return std::make_shared<Room>(region_, Range{*offset, *offset + bytes});
}

// What lies in the region, in the eyes of a window that looks ahead.
std::vector<Occupied> Ring::occupied(const Window& window, const std::vector<Range>& holes,
                                     bool evict_nothing) const {
  std::vector<Occupied> found;
  std::vector<Range> known = holes;
  for (const SlotPtr& slot : slots_) {
    if (slot->room == nullptr || slot->room->region() != region_.get()) continue;
    uint64_t after = free_after(*slot, window);
    if (after == 0 && evict_nothing) after = kNotKnown;
    known.push_back(slot->room->range());
    if (after > 0) found.push_back({slot->room->range(), after});
  }
  // The rest is held by operators whose weights have let go of it.
  std::sort(known.begin(), known.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  known.push_back({region_->arena.capacity(), region_->arena.capacity()});
  uint64_t end = 0;
  for (const Range& range : known) {
    if (range.begin > end) found.push_back({{end, range.begin}, kNotKnown});
    end = std::max(end, range.end);
  }
  return found;
}

// Uses from now until the slot can be evicted; 0: now.
uint64_t Ring::free_after(const Slot& slot, const Window& window) const {
  uint64_t wanted = 0, last = 0;
  for (size_t i = 0; i < window.ahead.size(); ++i) {
    if (window.ahead[i] != slot.weight->id()) continue;
    ++wanted;
    last = i;
  }
  if (slot.weight->in_ring.wanted > wanted) return kNotKnown;  // by other threads
  if (wanted > 0) return last + 2;
  if (evictable(slot)) return 0;
  const bool soon = slot.weight->id() == window.latest || clock_ - slot.used_at <= kJustUsed;
  return soon ? 1 : kNotKnown;
}

// Takes what has become free of a slot's room. True: that was all of it.
bool Ring::grow(const SlotPtr& slot) {
  if (slot->whole()) return true;
  for (const Range& piece : slot->room->missing()) evict_from(piece);
  for (const Range& part : slot->room->take()) fill(slot, part);
  return slot->whole();
}

void Ring::grow_all(Window& window) {
  for (const SlotPtr& slot : std::vector(window.growing)) grow(slot);
  std::erase_if(window.growing, [](const SlotPtr& slot) { return slot->whole(); });
}

bool Ring::evictable(const Slot& slot) const {
  const bool settled = slot.state == Slot::State::kReady || slot.state == Slot::State::kStored;
  if (!settled || slot.wrapped == nullptr) return false;  // the latter: has nothing to give
  return (slot.cheap || slot.weight->in_ring.wanted == 0) && !device_->in_use(slot.wrapped);
}

void Ring::evict_from(Range range) {
  for (auto next = slots_.begin(); next != slots_.end();) {
    const SlotPtr slot = *next++;
    if (slot->room == nullptr || !evictable(*slot)) continue;
    const Range held = slot->room->range();
    if (held.begin < range.end && range.begin < held.end) drop(slot);
  }
}

// The least recently used slot that no prediction and no op holds.
bool Ring::evict_one() {
  for (const SlotPtr& slot : slots_) {
    if (!evictable(*slot)) continue;
    drop(SlotPtr(slot));
    return true;
  }
  return false;
}

}  // namespace distorch
