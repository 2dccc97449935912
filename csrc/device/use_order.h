// SPDX-License-Identifier: Apache-2.0
// What used the memory of a ring, as one point in time that copies wait for.
#pragma once

#include <c10/core/Stream.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/events.h"

namespace distorch {

// Note [Order on streams]
// * Bytes travel on a stream of their own for each place they come from.
// * Operators wait for the event behind the copy of their weight, on the stream that is current
//   when they ask. The host waits for nothing.
// * A copy waits for everything that used its room before. All such uses lie behind one stream
//   that does nothing else (UseOrder):
//   - A slot's lease knows the streams that the slot was lent to. When its last holder lets go,
//     which is after the last operator was issued, one event goes from each of these streams to
//     that one. So a stream that nobody uses any more is never touched again.
//   - Copies to a slot that was dropped before it was lent go there, too.
//   - A refill takes one event from there to its own stream.
// * Bytes that readers bring are copied later than their room was taken. They wait for what had
//   used the room when it was taken, and for nothing later.
// * Weights that are not kept as they are get decoded on one more stream, behind their copies.
//   They have arrived when that is done.
// * The allocator of the ring's memory is told of that one stream. It does not give the memory to
//   somebody else before everything that lies behind the stream is done.
class UseOrder {
 public:
  explicit UseOrder(c10::Device device);

  // Adds what was issued on `user` until now. Does nothing while a graph is captured there:
  // torch.cuda.graph() waits for the device before it captures, so earlier work has ended.
  // Throws c10::Error where the stream or the device is gone.
  void add(const c10::Stream& user);
  // The work that `event` stands behind.
  void add(const EventPtr& event);

  // A point behind everything that was added until now.
  EventPtr now() { return events_.record(stream_); }
  // How often something was added. A copy stream that waited for now() at the same count need not
  // wait again.
  uint64_t count() const { return count_.load(std::memory_order_acquire); }

  EventPool& events() { return events_; }
  const c10::Stream& stream() const { return stream_; }

 private:
  const c10::Stream stream_;
  EventPool events_;  // of the same device
  std::atomic<uint64_t> count_{0};
};

// What operators hold of a slot. It keeps the slot's room until the last of them lets go, and then
// says which streams have used it: see Note [Order on streams].
class Lease {
 public:
  Lease(std::shared_ptr<UseOrder> order, std::shared_ptr<void> room)
      : order_(std::move(order)), room_(std::move(room)) {}
  ~Lease();  // from any thread
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // REQUIRES: somebody holds this, and the ring's mutex is held.
  void lent_to(const c10::Stream& stream);

 private:
  const std::shared_ptr<UseOrder> order_;
  std::vector<c10::Stream> streams_;
  // Let go of behind the events, which the destructor's body records first.
  const std::shared_ptr<void> room_;
};

}  // namespace distorch
