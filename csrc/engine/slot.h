// SPDX-License-Identifier: Apache-2.0
// One weight's place in a ring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "engine/room.h"
#include "engine/source.h"

namespace distorch {

class Weight;
struct Slot;
using SlotPtr = std::shared_ptr<Slot>;

// Why a slot has no bytes. Every thread that waited for it is told.
struct Failure {
  ErrorKind kind = ErrorKind::kFetch;
  std::string message;           // names the weight and its donor
  std::exception_ptr of_device;  // thrown instead, where the device is out of order

  // `why`: what went wrong, without the weight and its donor.
  static Failure of(const Slot& slot, const std::string& why, ErrorKind kind = ErrorKind::kFetch);
  [[noreturn]] void raise() const {
    if (of_device != nullptr) std::rethrow_exception(of_device);
    throw Error(kind, message);
  }
};

// A Transfer makes it, and keeps what its kind of device needs in a class derived from this one.
// All members are guarded by the ring's mutex. The bytes are not: while a slot is loading, readers
// and devices write to them.
struct Slot {
  Slot(std::string of, Source made_of) : name(std::move(of)), source(std::move(made_of)) {}
  virtual ~Slot() = default;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  const std::string name;  // the weight's, for messages
  // What the slot is filled from. The weight may be made of something else by now.
  const Source source;

  // --- Said by the Transfer that made it ---
  uint64_t room_bytes = 0;  // of the device, before its bytes can come
  // Of a second room, for the decoded weight. 0: it is decoded in the first one, or by a device.
  // See Note [Who decodes].
  uint64_t room_later = 0;
  // Decoded from host memory, so that nothing was read for it. It is evicted even if it is wanted.
  bool cheap = false;

  // --- Changed by the SlotCache alone, but for `wrapped`, which Transfer::place() makes ---
  Weight* weight = nullptr;       // null: not in the cache, or not any more
  std::shared_ptr<Room> room;     // null: none in the ring, or none needed
  std::shared_ptr<void> wrapped;  // what operators hold of it
  uint64_t used_at = 0;           // when it was handed out, by the forecast's clock
  bool overflow = false;          // in ordinary memory: let go as soon as it was handed out
  std::list<SlotPtr>::iterator in_list;

  // --- Changed by the Transfer alone ---
  // kLoading: the bytes cannot be used yet. kStored, on the host only: the donor's bytes are in
  // memory, and the thread that asks for the weight decodes them. kReady: the bytes can be lent. On
  // an accelerator, copies and decoding have only been queued then: Transfer::lend() has the
  // operator's stream wait for them.
  enum class State { kLoading, kStored, kReady, kFailed };
  State state = State::kLoading;
  std::optional<Failure> failure;  // of a failed one; none: it was only dropped, and is asked again
  std::byte* data = nullptr;       // the weight's bytes; null: they have no room yet

  bool whole() const { return room == nullptr || room->complete(); }
  bool in_cache() const { return weight != nullptr; }
};

inline Failure Failure::of(const Slot& slot, const std::string& why, ErrorKind kind) {
  return {kind, slot.source.could_not_bring(kind, slot.name, why).what(), nullptr};
}

}  // namespace distorch
