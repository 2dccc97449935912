// SPDX-License-Identifier: Apache-2.0
#include "device/accelerator.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "device/device_donor.h"
#include "device/device_trace.h"
#include "device/storages.h"
#include "engine/reads.h"
#include "engine/weight.h"

namespace distorch {
namespace {

constexpr uint64_t kBounceBytes = 2 << 20;

// A number that no other stream has.
uint64_t number_of(const c10::Stream& stream) {
  return (static_cast<uint64_t>(stream.device_index()) << 56) ^ static_cast<uint64_t>(stream.id());
}

// A copy on a stream, for the donor that it reads.
class StreamCopy : public PendingCopies::Copy {
 public:
  explicit StreamCopy(EventPtr ended) : ended_(std::move(ended)) {}
  void wait() override {
    try {
      wait_until_ended(ended_);
    } catch (const c10::Error&) {
      // The device is out of order, and copies nothing any more.
    }
  }

 private:
  const EventPtr ended_;
};

}  // namespace

struct Accelerator::DeviceSlot : Slot {
  using Slot::Slot;

  //   what is decoded elsewhere:  [ decoded bytes      | donor's bytes ]
  //                               data                 landing
  //   in place, or not decoded:   [ donor's bytes, which become the weight's ]
  //                               data == landing
  // Copies go to `landing`. The device decodes from there to `data`.
  std::byte* landing = nullptr;
  uint64_t landing_at = 0;  // offset in the slot's room
  // Of bytes that readers bring: the host memory that they fill, and where in it the bytes are.
  std::shared_ptr<PinnedBuffers::Buffer> staged;
  std::byte* staged_data = nullptr;
  EventPtr behind;                    // the users of the room before, when all of it was taken
  bool asked = false;                 // staged or decoded slots: all copies were asked for
  std::vector<EventPtr> events;       // behind the copies, or behind the decoding; timed
  std::weak_ptr<Lease> lease;         // what operators hold
  std::vector<c10::StreamId> waited;  // streams that waited for the events; none: never lent
  // When an operator needed the bytes, if the host had to wait for them; and on which stream.
  std::optional<std::pair<c10::Stream, EventPtr>> needed;
};

// Every slot of an Accelerator is made by make_slot().
Accelerator::DeviceSlot& Accelerator::device_slot(Slot& slot) {
  return static_cast<DeviceSlot&>(slot);
}

Accelerator::Accelerator(c10::Device device)
    : device_(device),
      guard_(device.type()),
      order_(std::make_shared<UseOrder>(device)),
      buffers_(PinnedBuffers::of(device)) {}

Accelerator::~Accelerator() {
  for (auto& [place, link] : links_) {
    if (!link.bounce) continue;
    try {
      for (const c10::Event& free : link.bounce->free) free.synchronize();
    } catch (const c10::Error&) {
      // The device is out of order, and copies nothing any more.
    }
  }
}

std::shared_ptr<std::byte> Accelerator::allocate(uint64_t bytes) {
  const c10::OptionalDeviceGuard on{device_};
  auto storage = std::make_shared<c10::Storage>(
      c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes),
      c10::GetAllocator(device_.type())->allocate(bytes), nullptr, false);
  guard_.recordDataPtrOnStream(storage->data_ptr(), order_->stream());
  order_->add(guard_.getStream(device_));  // copies follow what this memory was before
  auto* data = static_cast<std::byte*>(storage->mutable_data());
  return {std::move(storage), data};
}

bool Accelerator::in_use(const Slot& slot) const { return slot_in_use(slot.wrapped); }

bool Accelerator::recording() const {
  try {
    return is_captured(guard_.getStream(device_));
  } catch (const c10::Error&) {
    return false;  // the device is out of order: whatever is asked of it next says so
  }
}

bool Accelerator::brings_ahead(const Source& source) const {
  return !in_place_memory(source, device_);
}

// --- A slot's way until its bytes are asked for ---

SlotPtr Accelerator::make_slot(const std::string& name, Source source, uint64_t) {
  const auto slot = std::make_shared<DeviceSlot>(name, std::move(source));
  const Source& from = slot->source;
  const auto rounded = [&](uint64_t bytes) { return round_up_room(bytes, granule()); };
  slot->room_bytes = rounded(from.size());
  if (from.decoder != nullptr && !from.decoder->in_place()) {
    slot->landing_at = slot->room_bytes;
    slot->room_bytes += rounded(from.donor->size());
  }
  if (!from.donor->extents().empty()) return slot;  // the device copies from there by itself
  // A file has no extents. Readers bring its bytes to a pinned buffer.
  const uint64_t phase = from.donor->phase() % from.alignment == 0 ? from.donor->phase() : 0;
  slot->staged = buffers_->take(round_up(phase + from.donor->size(), kPage));
  slot->staged_data = slot->staged->data + phase;
  return slot;
}

void Accelerator::place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) {
  DeviceSlot& own = device_slot(slot);
  const auto lease = std::make_shared<Lease>(order_, std::move(block));
  slot.wrapped = slot_storage(memory, slot.source.size(), lease, device_);
  own.lease = lease;
  own.data = memory;
  own.landing = memory + own.landing_at;
}

void Accelerator::start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) {
  const DeviceSlot& own = device_slot(*slot);
  if (own.staged != nullptr) reads.queue(*this, slot, own.staged_data, urgency);
}

// The slot stays kLoading. The next issue() takes it from staged_, if its room is whole: of the
// thread that waits for it, or else of whoever fetches or ends an operator next.
void Accelerator::was_read(const SlotPtr& slot, std::optional<Failure> failure) {
  if (failure || !slot->in_cache()) return fail(*slot, std::move(failure));
  staged_.push_back(std::static_pointer_cast<DeviceSlot>(slot));
}

void Accelerator::grew(const SlotPtr& slot, Range part) {
  const auto own = std::static_pointer_cast<DeviceSlot>(slot);
  if (own->staged != nullptr) {  // is copied later, behind what has used the room until now
    own->behind = order_->now();
    return;
  }
  const uint64_t stored = slot->source.donor->size();
  // Decoded as a whole, so it is asked for once, when its room is whole.
  if (slot->source.decoder != nullptr) {
    if (!slot->whole() || std::exchange(own->asked, true)) return;
    part = {0, stored};
  }
  // The bytes lie at the beginning of the room: a part of it is the same part of the donor's bytes.
  bring(own, {part.begin, std::min(part.end, stored)});
}

bool Accelerator::dropped(Slot& slot) {
  DeviceSlot& own = device_slot(slot);
  if (own.staged != nullptr && !own.asked) {
    // Readers that are under way write to host memory. Who waits for the slot asks again.
    const auto same = [&](const DeviceSlotPtr& staged) { return staged.get() == &own; };
    if (std::erase_if(staged_, same) > 0) fail(slot);
    return true;
  }
  // The room of a slot that was lent is free behind its lease. Otherwise it is free behind the
  // copies that are on their way to it.
  if (!own.waited.empty()) return false;
  try {
    for (const EventPtr& event : own.events) order_->add(event);
  } catch (const c10::Error&) {
    // The device is out of order: nothing will be copied there any more.
  }
  return false;
}

// --- What the device is asked for ---

Accelerator::Link& Accelerator::link_from(const std::string& place) {
  const auto found = links_.find(place);
  if (found != links_.end()) return found->second;
  const c10::Device from(place);
  Link link{from, own_stream(device_), std::nullopt, {}, std::nullopt};
  if (!from.is_cpu()) {
    link.source = own_stream(from);
    if (!can_reach(device_.str(), place)) {
      link.bounce.emplace(
          Bounce{{pinned_memory(kBounceBytes, device_), pinned_memory(kBounceBytes, device_)},
                 {c10::Event(device_.type()), c10::Event(device_.type())},
                 EventPool(from.type()),
                 0});
    }
  }
  return links_.emplace(place, std::move(link)).first->second;
}

// Asks for a copy of a part of the donor's bytes, or of what readers have brought of them.
void Accelerator::bring(const DeviceSlotPtr& slot, Range part) {
  asked_ = true;
  std::vector<Extent> extents = slot->source.donor->extents();
  if (slot->staged != nullptr) {
    const uint64_t bytes = slot->source.donor->size();
    extents = {{0, bytes, "cpu", slot->staged_data, slot->staged.get(), nullptr}};
  }
  for (const Extent& extent : within(std::move(extents), part)) ask(extent, slot);
  // Last, so that a slot whose copies could not be queued is not decoded.
  if (slot->source.decoder != nullptr) to_decode_.push_back(slot);
}

// One copy more, or the last one grows if both lie side by side.
void Accelerator::ask(const Extent& extent, const DeviceSlotPtr& slot) {
  std::vector<Copy>& waiting = link_from(extent.place).waiting;
  std::byte* to = slot->landing + extent.begin;
  if (!waiting.empty()) {
    Copy& last = waiting.back();
    const auto gap = gap_between(last.from + last.bytes, last.to + last.bytes, extent.data, to);
    if (gap && last.owner == extent.owner) {
      last.bytes += *gap + extent.bytes;
      last.slots.push_back(slot);
      last.pending.push_back(extent.pending);
      return;
    }
  }
  waiting.push_back({extent.data, extent.owner, to, extent.bytes, {slot}, {extent.pending}});
}

// What readers brought to host memory goes on, as soon as its room is whole.
bool Accelerator::bring_staged() {
  bool any = false;
  for (auto next = staged_.begin(); next != staged_.end();) {
    const DeviceSlotPtr slot = *next;
    if (!slot->whole()) {
      ++next;
      continue;
    }
    next = staged_.erase(next);
    any = slot->asked = true;
    try {
      bring(slot, {0, slot->source.donor->size()});
    } catch (const std::exception& refused) {  // this thread may want another weight
      fail(*slot, Failure::of(*slot, refused.what()));
    }
  }
  return any;
}

// Whether the device itself still takes work.
bool Accelerator::answers() const {
  try {
    order_->now();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

// Does something that the device may refuse.
template <class Action>
std::optional<Accelerator::Refusal> Accelerator::attempt(const Action& action) const {
  try {
    action();
    return std::nullopt;
  } catch (const c10::Error& refused) {
    const std::exception_ptr error = answers() ? nullptr : std::current_exception();
    return Refusal{refused.what_without_backtrace(), error};
  } catch (const std::exception& refused) {
    return Refusal{refused.what(), nullptr};
  }
}

// --- What is issued ---

// If the device refuses something, the slots that it was for fail. If it takes no work at all (a
// kernel of the user's has failed an assertion, the device is lost), its error is thrown as it is:
// it is about no weight, and so it is not wrapped in ours.
bool Accelerator::issue() {
  const bool brought = bring_staged();
  if (!std::exchange(asked_, false)) return brought;
  std::exception_ptr out_of_order;
  const auto refuse = [&](Slot& slot, const Refusal& refusal) {
    if (!refusal.out_of_order) return fail(slot, Failure::of(slot, refusal.why));
    out_of_order = refusal.out_of_order;
    fail(slot, Failure{ErrorKind::kFetch, refusal.why, out_of_order});
  };
  for (auto& [place, link] : links_) {
    if (link.waiting.empty()) continue;
    const std::vector<Copy> copies = std::exchange(link.waiting, {});
    const auto no_link = attempt([&] { follow_users(link, copies); });
    for (const Copy& copy : copies) {
      const auto refusal = no_link ? no_link : attempt([&] { issue_copy(link, copy); });
      for (const auto& slot : copy.slots) {
        if (refusal) refuse(*slot, *refusal);
      }
    }
  }
  for (const auto& slot : std::exchange(to_decode_, {})) {  // kReady: its copies were issued above
    if (!slot->in_cache() || slot->state != Slot::State::kReady) continue;
    if (const auto refusal = attempt([&] { queue_decoding(*slot); })) refuse(*slot, *refusal);
  }
  if (out_of_order) std::rethrow_exception(out_of_order);
  return true;
}

// The link's stream waits for all that has used the ring's memory until now. Copies of bytes that
// readers brought wait only for DeviceSlot::behind, in send(), unless another copy goes with them.
void Accelerator::follow_users(Link& link, const std::vector<Copy>& copies) {
  const auto is_staged = [](const Copy& copy) { return copy.slots.front()->staged != nullptr; };
  const uint64_t uses = order_->count();
  if (uses == link.behind || std::all_of(copies.begin(), copies.end(), is_staged)) return;
  order_->now()->block(link.stream);
  link.behind = uses;
}

void Accelerator::issue_copy(Link& link, const Copy& copy) {
  const auto was_dropped = [](const DeviceSlotPtr& slot) { return !slot->in_cache(); };
  if (std::all_of(copy.slots.begin(), copy.slots.end(), was_dropped)) {
    for (const auto& slot : copy.slots) {  // who still waits for one asks again
      if (slot->state == Slot::State::kLoading) fail(*slot);
    }
    return;
  }
  std::exception_ptr refused;
  {
    const DeviceSpan span(link.stream, [&]() -> SpanText {
      const size_t more = copy.slots.size() - 1;
      return {"copies " + link.from.str() + "->" + device_.str(),
              copy.slots.front()->name + (more > 0 ? " and " + std::to_string(more) + " more" : ""),
              copy.bytes};
    });
    try {
      send(link, copy);
    } catch (const c10::Error&) {
      refused = std::current_exception();
    }
  }
  // Also behind a copy that was refused: a part of it may be on its way.
  arrived(link, copy, order_->events().record(link.stream, Timing::kTimed));
  if (refused) std::rethrow_exception(refused);
  for (const auto& slot : copy.slots) {
    // Of several copies of a slot, the others are issued in the same call, or make it fail.
    if (slot->state == Slot::State::kLoading && slot->whole()) slot->state = Slot::State::kReady;
  }
}

void Accelerator::send(Link& link, const Copy& copy) {
  for (const auto& slot : copy.slots) {
    if (slot->behind) slot->behind->block(link.stream);
  }
  if (link.bounce) return bounce(link, copy);
  const at::Tensor from = bytes_at(copy.from, copy.bytes, link.from);
  const at::Tensor to = bytes_at(copy.to, copy.bytes, device_);
  const c10::OptionalStreamGuard on_source(link.source);
  const c10::StreamGuard on_target(link.stream);
  copy_bytes(from, to, true);
}

// Everybody who has to wait for a copy gets the event behind it.
void Accelerator::arrived(Link& link, const Copy& copy, const EventPtr& event) {
  for (const PendingCopies* pending : copy.pending) {
    if (pending == nullptr) continue;
    pending->add(number_of(link.stream), std::make_shared<StreamCopy>(event));
  }
  for (const auto& slot : copy.slots) {
    slot->events.push_back(event);
    if (!slot->in_cache()) order_->add(event);
    if (slot->staged == nullptr) continue;
    slot->staged->copied = event;
    slot->staged.reset();
  }
}

// Through two buffers in turn, so that both ways are busy at once.
void Accelerator::bounce(Link& link, const Copy& copy) {
  Bounce& through = *link.bounce;
  for (uint64_t begin = 0; begin < copy.bytes; begin += kBounceBytes) {
    const uint64_t bytes = std::min(kBounceBytes, copy.bytes - begin);
    const size_t turn = through.next++ % 2;
    const at::Tensor buffer = through.buffer[turn].narrow(0, 0, static_cast<int64_t>(bytes));
    through.free[turn].block(*link.source);
    {
      const c10::StreamGuard on_source(*link.source);
      copy_bytes(bytes_at(copy.from + begin, bytes, link.from), buffer, true);
    }
    through.down.record(*link.source)->block(link.stream);
    const c10::StreamGuard on_target(link.stream);
    copy_bytes(buffer, bytes_at(copy.to + begin, bytes, device_), true);
    through.free[turn].record(link.stream);
  }
}

// Behind the copies of a slot, and behind whatever used its room before.
void Accelerator::queue_decoding(DeviceSlot& slot) {
  if (!decoding_) decoding_ = own_stream(device_);
  const c10::Stream& stream = *decoding_;
  const Decoder& decoder = *slot.source.decoder;
  order_->now()->block(stream);
  for (const EventPtr& event : slot.events) event->block(stream);
  {
    const DeviceSpan span(stream, [&]() -> SpanText {
      return {"decodes " + device_.str(), slot.name, decoder.stored_bytes()};
    });
    const c10::OptionalDeviceGuard on_device{device_};
    const c10::StreamGuard on_stream(stream);
    decoder.decode_on_device(slot.landing, slot.data);
  }
  slot.events = {order_->events().record(stream, Timing::kTimed)};
}

// --- Operators ---

bool Accelerator::times_wait(Slot& slot) {
  DeviceSlot& own = device_slot(slot);
  if (own.needed) return true;
  const c10::Stream stream = guard_.getStream(device_);
  own.needed.emplace(stream, order_->events().record(stream, Timing::kTimed));
  return true;
}

// See Note [How long a stream waits].
void Accelerator::lend(Slot& slot, Counters& counters) {
  DeviceSlot& own = device_slot(slot);
  const c10::Stream stream = guard_.getStream(device_);
  if (const auto lease = own.lease.lock()) lease->lent_to(stream);
  auto& waited = own.waited;
  if (std::find(waited.begin(), waited.end(), stream.id()) != waited.end()) return;
  EventPtr needed;
  if (own.needed && own.needed->first == stream) {
    needed = std::exchange(own.needed, std::nullopt)->second;
  } else {
    needed = order_->events().record(stream, Timing::kTimed);
  }
  const DeviceSpan span(
      stream, [&]() -> SpanText { return {"stalls " + device_.str(), slot.name}; }, needed);
  for (const EventPtr& event : own.events) event->block(stream);
  waited.push_back(stream.id());
  counters.stalls(std::make_unique<DeviceTime>(std::move(needed), own.events));
}

}  // namespace distorch
