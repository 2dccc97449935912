// SPDX-License-Identifier: Apache-2.0
#include "engine/host_transfer.h"

#include <algorithm>
#include <utility>

#include "engine/reads.h"
#include "engine/trace_log.h"

namespace distorch {
namespace {

struct HostSlot : Slot {
  using Slot::Slot;
  // Offsets in the slot's room.
  uint64_t data_at = 0;     // of the weight's bytes, unless they get a room later
  uint64_t landing_at = 0;  // of the donor's bytes
  // Where readers put the donor's bytes, or where these are anyway.
  std::byte* landing = nullptr;
};

// Every slot of a HostTransfer is made by make_slot().
HostSlot& host_slot(Slot& slot) { return static_cast<HostSlot&>(slot); }

}  // namespace

SlotPtr HostTransfer::make_slot(const std::string& name, Source source, uint64_t large) {
  const auto slot = std::make_shared<HostSlot>(name, std::move(source));
  const Source& from = slot->source;
  const uint64_t phase = from.donor->phase(), stored = from.donor->size();
  const auto pages = [](uint64_t bytes) { return round_up_room(bytes, kPage); };
  if (from.decodes_memory()) {
    slot->landing = from.donor->host();
    slot->cheap = true;
    slot->room_later = pages(from.size());
    slot->state = Slot::State::kStored;
  } else if (from.decoder == nullptr || from.decoder->in_place()) {
    slot->landing_at = slot->data_at = phase % from.alignment == 0 ? phase : 0;
    slot->room_bytes = pages(slot->data_at + stored);
  } else if (const uint64_t decoded = pages(from.size()); decoded > large) {
    slot->landing_at = phase;
    slot->room_bytes = pages(phase + stored);
    slot->room_later = decoded;
  } else {
    slot->landing_at = decoded + phase;
    slot->room_bytes = decoded + pages(phase + stored);
  }
  return slot;
}

void HostTransfer::place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) {
  HostSlot& own = host_slot(slot);
  if (slot.state == Slot::State::kStored) {  // somebody is about to decode it
    slot.wrapped = wrap(memory, slot.source.size(), std::move(block));
    slot.data = memory;
    return;
  }
  std::byte* landing = memory + own.landing_at;
  // Null: the decoded bytes get their room in the second call.
  std::byte* data = slot.room_later == 0 ? memory + own.data_at : nullptr;
  slot.wrapped = data != nullptr ? wrap(data, slot.source.size(), std::move(block))
                                 : wrap(landing, slot.source.donor->size(), std::move(block));
  own.landing = landing;
  slot.data = data;
}

void HostTransfer::start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) {
  if (slot->state == Slot::State::kLoading) {
    reads.queue(*this, slot, host_slot(*slot).landing, urgency);
  }
}

void HostTransfer::was_read(const SlotPtr& slot, std::optional<Failure> failure) {
  if (failure) return fail(*slot, std::move(failure));
  slot->state = slot->source.decoder != nullptr ? Slot::State::kStored : Slot::State::kReady;
}

// The slot is loading meanwhile: other threads that want the weight wait, as for a read.
void HostTransfer::decode(Slot& slot, RingMutex::Lock& lock) {
  slot.state = Slot::State::kLoading;
  try {
    const RingMutex::Unlocked other_threads_go_on(lock);
    const HostSpan span("decodes", slot.name, slot.source.donor->size());
    decode_all(*slot.source.decoder, host_slot(slot).landing, slot.data);
  } catch (const Error& error) {
    return fail(slot, Failure::of(slot, error.what(), error.kind()));
  } catch (const std::exception& error) {
    return fail(slot, Failure::of(slot, error.what()));
  }
  slot.state = Slot::State::kReady;
}

}  // namespace distorch
