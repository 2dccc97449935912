// SPDX-License-Identifier: Apache-2.0
// A compute device with streams: fetched bytes come by asynchronous copies.
#pragma once

#include <c10/core/Storage.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/events.h"
#include "device/pinned.h"
#include "device/use_order.h"
#include "engine/donor.h"
#include "engine/transfer.h"

namespace distorch {

// What waits for what is in Note [Order on streams] (device/use_order.h). All calls but
// recording() come with the ring's mutex held, which guards all members that change.
class Accelerator : public Transfer {
 public:
  explicit Accelerator(c10::Device device);
  ~Accelerator() override;  // waits for copies through its own buffers

  uint64_t granule() const override { return 512; }
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override;
  bool in_use(const Slot& slot) const override;
  bool in_parts() const override { return true; }
  bool recording() const override;
  bool brings_ahead(const Source& source) const override;

  SlotPtr make_slot(const std::string& name, Source source, uint64_t large) override;
  void place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) override;
  void start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) override;
  void was_read(const SlotPtr& slot, std::optional<Failure> failure) override;
  void grew(const SlotPtr& slot, Range part) override;
  bool issue() override;
  void lend(Slot& slot, Counters& counters) override;
  bool times_wait(Slot& slot) override;
  bool dropped(Slot& slot) override;

 private:
  struct DeviceSlot;
  using DeviceSlotPtr = std::shared_ptr<DeviceSlot>;

  // A copy that was asked for; neighbours become one.
  struct Copy {
    const std::byte* from;
    const void* owner;  // only copies from one owner are joined
    std::byte* to;
    uint64_t bytes;
    std::vector<DeviceSlotPtr> slots;
    std::vector<const PendingCopies*> pending;  // of the donors of these slots, or of their parts
  };
  // Two buffers in host memory for a device that this one cannot reach.
  struct Bounce {
    at::Tensor buffer[2];
    c10::Event free[2];
    EventPool down;  // of the other device: the bytes are in the buffer
    size_t next = 0;
  };
  struct Link {
    c10::Device from;
    c10::Stream stream;                 // of this device
    std::optional<c10::Stream> source;  // of the donor's device
    std::vector<Copy> waiting;
    std::optional<Bounce> bounce;
    uint64_t behind = 0;  // UseOrder::count() when this link waited for it last
  };
  // Why the device did not do something.
  struct Refusal {
    std::string why;
    std::exception_ptr out_of_order;  // the device's own error; null: it still takes other work
  };

  static DeviceSlot& device_slot(Slot& slot);
  Link& link_from(const std::string& place);
  // What is asked for: bring() a part of a slot's bytes, ask() for one copy of it.
  void bring(const DeviceSlotPtr& slot, Range part);
  void ask(const Extent& extent, const DeviceSlotPtr& slot);
  bool bring_staged();
  // What is issued, in this order: for each link follow_users(), and for each copy issue_copy(),
  // which calls send() and arrived(); then queue_decoding().
  void follow_users(Link& link, const std::vector<Copy>& copies);
  void issue_copy(Link& link, const Copy& copy);
  void send(Link& link, const Copy& copy);
  void bounce(Link& link, const Copy& copy);
  void arrived(Link& link, const Copy& copy, const EventPtr& event);
  void queue_decoding(DeviceSlot& slot);
  bool answers() const;
  template <class Action>
  std::optional<Refusal> attempt(const Action& action) const;

  const c10::Device device_;
  const c10::impl::VirtualGuardImpl guard_;
  const std::shared_ptr<UseOrder> order_;
  const std::shared_ptr<PinnedBuffers> buffers_;
  std::map<std::string, Link> links_;
  std::vector<DeviceSlotPtr> staged_;  // read to host memory, and not yet copied
  std::optional<c10::Stream> decoding_;
  std::vector<DeviceSlotPtr> to_decode_;  // asked for since the last issue()
  bool asked_ = false;                    // for anything since then
};

}  // namespace distorch
