// SPDX-License-Identifier: Apache-2.0
// Accelerator (device/accelerator.h) under a virtual clock.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/transfer.h"
#include "rehearsal/rehearsed_weight.h"
#include "rehearsal/stage.h"

namespace distorch {

// It does what Accelerator does, in the same order: see there, and Note [Order on streams], for the
// reasons. Nothing fails here, one stream computes, and a device that is reached through host
// memory counts as one link. A change of the order there is to be made here, too; tests/prediction
// fails otherwise.
class RehearsedDevice : public Transfer {
 public:
  explicit RehearsedDevice(Stage& stage);

  uint64_t granule() const override { return 512; }
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override;
  bool in_use(const Slot& slot) const override { return slot.wrapped.use_count() > 1; }
  bool in_parts() const override { return true; }

  SlotPtr make_slot(const std::string& name, Source source, uint64_t large) override;
  void place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) override;
  void start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) override;
  void was_read(const SlotPtr& slot, std::optional<Failure> failure) override;
  void grew(const SlotPtr& slot, Range part) override;
  bool issue() override;
  void lend(Slot& slot, Counters& counters) override;
  bool times_wait(Slot& slot) override;
  bool dropped(Slot& slot) override;

  // What an operator waited for: from when it was needed until the last copy had ended.
  struct Stall {
    std::string weight;
    MarkPtr needed;
    std::vector<MarkPtr> arrived;
  };
  // Since the last call.
  std::vector<Stall> take_stalls() { return std::exchange(stalls_, {}); }

 private:
  struct DeviceSlot;
  using DeviceSlotPtr = std::shared_ptr<DeviceSlot>;
  struct UseOrder;
  struct Lease;

  struct Copy {
    const std::byte* from;
    const void* owner;
    std::byte* to;
    uint64_t bytes;
    std::vector<DeviceSlotPtr> slots;
  };
  struct Link {
    std::string place;
    int stream;
    int source;  // a stream of the device it comes from; -1: from here, or from host memory
    std::vector<Copy> waiting;
    uint64_t behind = 0;
  };

  static DeviceSlot& device_slot(Slot& slot);
  Link& link_from(const std::string& place);
  void bring(const DeviceSlotPtr& slot, Range part);
  void ask(const Extent& extent, const DeviceSlotPtr& slot);
  bool bring_staged();
  void follow_users(Link& link, const std::vector<Copy>& copies);
  void issue_copy(Link& link, const Copy& copy);
  void queue_decoding(DeviceSlot& slot);

  Stage& stage_;
  const std::shared_ptr<UseOrder> order_;
  std::map<std::string, Link> links_;
  std::vector<DeviceSlotPtr> staged_;
  std::vector<DeviceSlotPtr> to_decode_;
  std::vector<Stall> stalls_;
  int decoding_ = -1;
  bool asked_ = false;
};

}  // namespace distorch
