#include "device/accelerator.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "device/device_donor.h"
#include "device/device_trace.h"
#include "device/row_decoder.h"
#include "device/storages.h"

namespace distorch {
namespace {

constexpr uint64_t kBounceBytes = 2 << 20;
constexpr uint64_t kMergeGap = 512;  // padding between neighbours that is copied along

// What a device knows of a slot: the bytes on their way, and who was lent them.
struct Arrival {
  std::weak_ptr<Lease> lease;
  std::vector<EventPtr> events;       // behind the copies; timed
  EventPtr behind;                    // users of the room, where readers bring the bytes
  std::vector<c10::StreamId> waited;  // streams that waited for the events
  // When an operator needed the bytes, if the host had to wait for them; and on which stream.
  std::optional<std::pair<c10::Stream, EventPtr>> asked;
};

Arrival& arrival_of(Slot& slot) {
  if (slot.arrival == nullptr) slot.arrival = std::make_shared<Arrival>();
  return *static_cast<Arrival*>(slot.arrival.get());
}

bool was_dropped(const std::shared_ptr<Slot>& slot) { return slot->weight == nullptr; }

void fail(Slot& slot, const std::string& error) {
  slot.state = Slot::State::kFailed;
  slot.error = error;
}

// Another one for each stream of each device.
uint64_t number_of(const c10::Stream& stream) {
  return (static_cast<uint64_t>(stream.device_index()) << 56) ^ static_cast<uint64_t>(stream.id());
}

// A copy on a stream, for the donor that it reads.
class StreamCopy : public Readers::Copy {
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

std::shared_ptr<void> Accelerator::wrap(Slot& slot, std::byte* data, uint64_t bytes,
                                        std::shared_ptr<void> block) {
  auto lease = std::make_shared<Lease>(order_, std::move(block));
  arrival_of(slot).lease = lease;
  return slot_storage(data, bytes, std::move(lease), device_);
}

bool Accelerator::in_use(const std::shared_ptr<void>& wrapped) const {
  return slot_in_use(wrapped);
}

bool Accelerator::recording() const {
  try {
    return is_captured(guard_.getStream(device_));
  } catch (const c10::Error&) {
    return false;  // the device is out of order: whatever is asked of it next says so
  }
}

bool Accelerator::brings(const Donor& donor) const { return !donor.extents().empty(); }

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

void Accelerator::bring(const std::shared_ptr<Slot>& slot, Range part) {
  const Donor& donor = *slot->source.donor;
  std::vector<Extent> extents = donor.extents();
  if (slot->staged != nullptr) {
    extents = {{0, donor.size(), "cpu", slot->staged_data, slot->staged.get(), nullptr}};
  }
  for (Extent extent : extents) {
    const uint64_t from = std::max(part.begin, extent.begin);
    const uint64_t to_end = std::min(part.end, extent.begin + extent.bytes);
    if (from > to_end || (from == to_end && extent.bytes > 0)) continue;
    extent.data += from - extent.begin;
    extent.begin = from;
    extent.bytes = to_end - from;
    std::vector<Copy>& waiting = link_from(extent.place).waiting;
    std::byte* to = slot->landing() + extent.begin;
    if (!waiting.empty()) {
      Copy& last = waiting.back();
      const auto gap = static_cast<uint64_t>(to - (last.to + last.bytes));
      if (last.owner == extent.owner && to >= last.to + last.bytes && gap < kMergeGap &&
          extent.data == last.from + last.bytes + gap) {
        last.bytes += gap + extent.bytes;
        last.slots.push_back(slot);
        last.readers.push_back(extent.readers);
        continue;
      }
    }
    waiting.push_back({extent.data, extent.owner, to, extent.bytes, {slot}, {extent.readers}});
  }
  // Last, so that a slot whose copies could not be queued is not decoded.
  if (slot->source.decoder != nullptr) to_decode_.push_back(slot);
}

void Accelerator::took(Slot& slot) { arrival_of(slot).behind = order_->now(); }

// Whether the device itself still takes work.
bool Accelerator::answers() const {
  try {
    order_->now();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

void Accelerator::flush(std::vector<std::shared_ptr<Slot>>* failed) {
  std::exception_ptr out_of_order;
  for (auto& [place, link] : links_) {
    if (link.waiting.empty()) continue;
    try {
      issue_all(link, failed);
    } catch (const c10::Error&) {
      out_of_order = std::current_exception();
    }
  }
  for (const auto& slot : std::exchange(to_decode_, {})) {
    if (was_dropped(slot) || slot->state != Slot::State::kReady) continue;
    try {
      decode(slot);
      continue;
    } catch (const c10::Error& refused) {
      if (!answers()) out_of_order = std::current_exception();
      fail(*slot, refused.what_without_backtrace());
    } catch (const std::exception& refused) {
      fail(*slot, refused.what());
    }
    failed->push_back(slot);
  }
  if (out_of_order) std::rethrow_exception(out_of_order);
}

// If the device refuses a copy, the slots of that copy fail. If the device takes no work at all (a
// kernel of the user's has failed an assertion, the device is lost), its error is thrown as it is.
void Accelerator::issue_all(Link& link, std::vector<std::shared_ptr<Slot>>* failed) {
  const std::vector<Copy> copies = std::exchange(link.waiting, {});
  const auto is_read = [](const Copy& copy) { return copy.slots.front()->staged != nullptr; };
  std::exception_ptr out_of_order;
  std::string error;
  const auto attempt = [&](const auto& action) {
    try {
      action();
      return true;
    } catch (const c10::Error& refused) {
      error = refused.what_without_backtrace();
      if (!answers()) out_of_order = std::current_exception();
    } catch (const std::exception& refused) {
      error = refused.what();
    }
    return false;
  };
  const bool ready = attempt([&] {
    const uint64_t uses = order_->count();
    if (uses == link.behind || std::all_of(copies.begin(), copies.end(), is_read)) return;
    order_->now()->block(link.stream);
    link.behind = uses;
  });
  for (const Copy& copy : copies) {
    if (ready && attempt([&] { issue(link, copy); })) continue;
    for (const auto& slot : copy.slots) {
      fail(*slot, error);
      failed->push_back(slot);
    }
  }
  if (out_of_order) std::rethrow_exception(out_of_order);
}

void Accelerator::issue(Link& link, const Copy& copy) {
  if (std::all_of(copy.slots.begin(), copy.slots.end(), was_dropped)) {
    for (const auto& slot : copy.slots) {  // who still waits for one asks again
      if (slot->state == Slot::State::kLoading) fail(*slot, "");
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
    if (slot->state == Slot::State::kLoading && slot->whole()) slot->state = Slot::State::kReady;
  }
}

void Accelerator::send(Link& link, const Copy& copy) {
  for (const auto& slot : copy.slots) {
    if (const EventPtr& used = arrival_of(*slot).behind) used->block(link.stream);
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
  for (const Readers* readers : copy.readers) {
    if (readers != nullptr)
      readers->add(number_of(link.stream), std::make_shared<StreamCopy>(event));
  }
  for (const auto& slot : copy.slots) {
    arrival_of(*slot).events.push_back(event);
    if (was_dropped(slot)) order_->add(event);
    if (slot->staged == nullptr) continue;
    static_cast<PinnedBuffers::Buffer&>(*slot->staged).copied = event;
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
void Accelerator::decode(const std::shared_ptr<Slot>& slot) {
  if (!decoding_) decoding_ = own_stream(device_);
  const c10::Stream& stream = *decoding_;
  const auto& decoder = static_cast<const RowDecoder&>(*slot->source.decoder);
  Arrival& arrival = arrival_of(*slot);
  order_->now()->block(stream);
  for (const EventPtr& event : arrival.events) event->block(stream);
  {
    const DeviceSpan span(stream, [&]() -> SpanText {
      return {"decodes " + device_.str(), slot->name, decoder.stored_bytes()};
    });
    const c10::OptionalDeviceGuard on_device{device_};
    const c10::StreamGuard on_stream(stream);
    decoder.decode_on_device(bytes_at(slot->landing(), decoder.stored_bytes(), device_),
                             bytes_at(slot->data, decoder.decoded_bytes(), device_), stream);
  }
  arrival.events = {order_->events().record(stream, Timing::kTimed)};
}

// The room of a slot that was lent is free behind its lease. Otherwise it is free behind the copies
// that are on their way to it.
void Accelerator::dropped(Slot& slot) {
  const Arrival& arrival = arrival_of(slot);
  if (!arrival.waited.empty()) return;
  try {
    for (const EventPtr& event : arrival.events) order_->add(event);
  } catch (const c10::Error&) {
    // The device is out of order: nothing will be copied there any more.
  }
}

bool Accelerator::waits(Slot& slot) {
  Arrival& arrival = arrival_of(slot);
  if (arrival.asked) return true;
  const c10::Stream stream = guard_.getStream(device_);
  arrival.asked.emplace(stream, order_->events().record(stream, Timing::kTimed));
  return true;
}

// See Note [How long a stream waits].
void Accelerator::lend(Slot& slot, Counters& counters) {
  const c10::Stream stream = guard_.getStream(device_);
  Arrival& arrival = arrival_of(slot);
  if (const auto lease = arrival.lease.lock()) lease->lent_to(stream);
  auto& waited = arrival.waited;
  if (std::find(waited.begin(), waited.end(), stream.id()) != waited.end()) return;
  const DeviceSpan span(stream,
                        [&]() -> SpanText { return {"stalls " + device_.str(), slot.name}; });
  EventPtr needed;
  if (arrival.asked && arrival.asked->first == stream) {
    needed = std::exchange(arrival.asked, std::nullopt)->second;
  } else {
    needed = order_->events().record(stream, Timing::kTimed);
  }
  for (const EventPtr& event : arrival.events) event->block(stream);
  waited.push_back(stream.id());
  counters.stalls(std::make_unique<DeviceTime>(std::move(needed), arrival.events));
}

}  // namespace distorch
