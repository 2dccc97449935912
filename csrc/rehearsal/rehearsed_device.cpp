// SPDX-License-Identifier: Apache-2.0
#include "rehearsal/rehearsed_device.h"

#include <algorithm>
#include <utility>

#include "core/alignment.h"
#include "engine/reads.h"

namespace distorch {

// As distorch::UseOrder, with marks for events.
struct RehearsedDevice::UseOrder {
  explicit UseOrder(Stage& of) : stage(of), stream(of.new_stream("order")) {}
  void add(const MarkPtr& mark) {
    stage.wait(stream, mark);
    ++count;
  }
  MarkPtr now() { return stage.record(stream); }
  Stage& stage;
  const int stream;
  uint64_t count = 0;
};

// As distorch::Lease.
struct RehearsedDevice::Lease {
  Lease(std::shared_ptr<UseOrder> in, std::shared_ptr<void> kept)
      : order(std::move(in)), room(std::move(kept)) {}
  ~Lease() {
    if (lent) order->add(order->stage.record(order->stage.compute_stream()));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  const std::shared_ptr<UseOrder> order;
  bool lent = false;
  const std::shared_ptr<void> room;
};

struct RehearsedDevice::DeviceSlot : Slot {
  using Slot::Slot;
  std::byte* landing = nullptr;
  uint64_t landing_at = 0;
  std::shared_ptr<std::byte> staged;  // host memory that readers fill, and that is copied from
  MarkPtr behind;
  bool asked = false;
  std::vector<MarkPtr> arrived;  // behind the copies, or behind the decoding
  std::weak_ptr<Lease> lease;
  bool waited = false;  // the compute stream did, for all of `arrived`
  MarkPtr needed;       // if the host had to wait
};

RehearsedDevice::DeviceSlot& RehearsedDevice::device_slot(Slot& slot) {
  return static_cast<DeviceSlot&>(slot);
}

RehearsedDevice::RehearsedDevice(Stage& stage)
    : stage_(stage), order_(std::make_shared<UseOrder>(stage)) {}

std::shared_ptr<std::byte> RehearsedDevice::allocate(uint64_t bytes) {
  order_->add(stage_.record(stage_.compute_stream()));  // copies follow what the memory was before
  return stage_.no_memory(bytes);
}

SlotPtr RehearsedDevice::make_slot(const std::string& name, Source source, uint64_t) {
  const auto slot = std::make_shared<DeviceSlot>(name, std::move(source));
  const Source& from = slot->source;
  slot->room_bytes = round_up_room(from.size(), granule());
  if (from.decoder != nullptr && !from.decoder->in_place()) {
    slot->landing_at = slot->room_bytes;
    slot->room_bytes += round_up_room(from.donor->size(), granule());
  }
  if (from.donor->extents().empty()) slot->staged = stage_.no_memory(from.donor->size());
  return slot;
}

void RehearsedDevice::place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) {
  DeviceSlot& own = device_slot(slot);
  const auto lease = std::make_shared<Lease>(order_, std::move(block));
  slot.wrapped = lease;
  own.lease = lease;
  own.data = memory;
  own.landing = memory + own.landing_at;
}

void RehearsedDevice::start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) {
  const DeviceSlot& own = device_slot(*slot);
  if (own.staged != nullptr) reads.queue(*this, slot, own.staged.get(), urgency);
}

void RehearsedDevice::was_read(const SlotPtr& slot, std::optional<Failure> failure) {
  if (failure || !slot->in_cache()) return fail(*slot, std::move(failure));
  staged_.push_back(std::static_pointer_cast<DeviceSlot>(slot));
}

void RehearsedDevice::grew(const SlotPtr& slot, Range part) {
  const auto own = std::static_pointer_cast<DeviceSlot>(slot);
  if (own->staged != nullptr) {
    own->behind = order_->now();
    return;
  }
  const uint64_t stored = slot->source.donor->size();
  if (slot->source.decoder != nullptr) {
    if (!slot->whole() || std::exchange(own->asked, true)) return;
    part = {0, stored};
  }
  bring(own, {part.begin, std::min(part.end, stored)});
}

bool RehearsedDevice::dropped(Slot& slot) {
  DeviceSlot& own = device_slot(slot);
  if (own.staged != nullptr && !own.asked) {
    const auto same = [&](const DeviceSlotPtr& staged) { return staged.get() == &own; };
    if (std::erase_if(staged_, same) > 0) fail(slot);
    return true;
  }
  if (own.waited) return false;
  for (const MarkPtr& mark : own.arrived) order_->add(mark);
  return false;
}

// --- What the device is asked for ---

RehearsedDevice::Link& RehearsedDevice::link_from(const std::string& place) {
  const auto found = links_.find(place);
  if (found != links_.end()) return found->second;
  const std::string track = "copies " + place + "->" + stage_.compute_device();
  const bool other = place != "cpu" && place != stage_.compute_device();
  const int source = other ? stage_.new_stream(track) : -1;
  return links_.emplace(place, Link{place, stage_.new_stream(track), source, {}}).first->second;
}

void RehearsedDevice::bring(const DeviceSlotPtr& slot, Range part) {
  asked_ = true;
  std::vector<Extent> extents = slot->source.donor->extents();
  if (slot->staged != nullptr) {
    const uint64_t bytes = slot->source.donor->size();
    extents = {{0, bytes, "cpu", slot->staged.get(), slot->staged.get(), nullptr}};
  }
  for (const Extent& extent : within(std::move(extents), part)) ask(extent, slot);
  if (slot->source.decoder != nullptr) to_decode_.push_back(slot);
}

void RehearsedDevice::ask(const Extent& extent, const DeviceSlotPtr& slot) {
  std::vector<Copy>& waiting = link_from(extent.place).waiting;
  std::byte* to = slot->landing + extent.begin;
  if (!waiting.empty()) {
    Copy& last = waiting.back();
    const auto gap = gap_between(last.from + last.bytes, last.to + last.bytes, extent.data, to);
    if (gap && last.owner == extent.owner) {
      last.bytes += *gap + extent.bytes;
      last.slots.push_back(slot);
      return;
    }
  }
  waiting.push_back({extent.data, extent.owner, to, extent.bytes, {slot}});
}

bool RehearsedDevice::bring_staged() {
  bool any = false;
  for (auto next = staged_.begin(); next != staged_.end();) {
    const DeviceSlotPtr slot = *next;
    if (!slot->whole()) {
      ++next;
      continue;
    }
    next = staged_.erase(next);
    any = slot->asked = true;
    bring(slot, {0, slot->source.donor->size()});
  }
  return any;
}

// --- What is issued ---

bool RehearsedDevice::issue() {
  const bool brought = bring_staged();
  if (!std::exchange(asked_, false)) return brought;
  for (auto& [place, link] : links_) {
    if (link.waiting.empty()) continue;
    const std::vector<Copy> copies = std::exchange(link.waiting, {});
    follow_users(link, copies);
    for (const Copy& copy : copies) issue_copy(link, copy);
  }
  for (const auto& slot : std::exchange(to_decode_, {})) {
    if (slot->in_cache() && slot->state == Slot::State::kReady) queue_decoding(*slot);
  }
  return true;
}

void RehearsedDevice::follow_users(Link& link, const std::vector<Copy>& copies) {
  const auto is_staged = [](const Copy& copy) { return copy.slots.front()->staged != nullptr; };
  if (order_->count == link.behind || std::all_of(copies.begin(), copies.end(), is_staged)) return;
  stage_.wait(link.stream, order_->now());
  link.behind = order_->count;
}

void RehearsedDevice::issue_copy(Link& link, const Copy& copy) {
  const auto was_dropped = [](const DeviceSlotPtr& slot) { return !slot->in_cache(); };
  if (std::all_of(copy.slots.begin(), copy.slots.end(), was_dropped)) {
    for (const auto& slot : copy.slots) {
      if (slot->state == Slot::State::kLoading) fail(*slot);
    }
    return;
  }
  for (const auto& slot : copy.slots) {
    if (slot->behind) stage_.wait(link.stream, slot->behind);
  }
  const std::string& name = copy.slots.front()->name;
  if (link.source < 0) {
    stage_.copy(link.stream, name, link.place, copy.bytes);
  } else {  // PyTorch copies on the stream of the source, between the work of both
    stage_.wait(link.source, stage_.record(link.stream));
    stage_.copy(link.source, name, link.place, copy.bytes);
    stage_.wait(link.stream, stage_.record(link.source));
  }
  const MarkPtr arrived = stage_.record(link.stream);
  for (const auto& slot : copy.slots) {
    slot->arrived.push_back(arrived);
    if (!slot->in_cache()) order_->add(arrived);
    if (slot->state == Slot::State::kLoading && slot->whole()) slot->state = Slot::State::kReady;
  }
}

void RehearsedDevice::queue_decoding(DeviceSlot& slot) {
  if (decoding_ < 0) {
    decoding_ = stage_.new_stream("decodes " + stage_.compute_device());
  }
  stage_.wait(decoding_, order_->now());
  for (const MarkPtr& mark : slot.arrived) stage_.wait(decoding_, mark);
  const auto& decoder = static_cast<const RehearsedDecoder&>(*slot.source.decoder);
  stage_.compute_on(decoding_, slot.name, decoder.seconds());
  slot.arrived = {stage_.record(decoding_)};
}

// --- Operators ---

bool RehearsedDevice::times_wait(Slot& slot) {
  DeviceSlot& own = device_slot(slot);
  if (own.needed == nullptr) own.needed = stage_.record(stage_.compute_stream());
  return true;
}

void RehearsedDevice::lend(Slot& slot, Counters&) {
  DeviceSlot& own = device_slot(slot);
  if (const auto lease = own.lease.lock()) lease->lent = true;
  if (std::exchange(own.waited, true)) return;
  const int compute = stage_.compute_stream();
  MarkPtr needed = std::exchange(own.needed, nullptr);
  if (needed == nullptr) needed = stage_.record(compute);
  for (const MarkPtr& mark : own.arrived) stage_.wait(compute, mark);
  stalls_.push_back({slot.name, std::move(needed), own.arrived});
}

}  // namespace distorch
