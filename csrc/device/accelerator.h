// A compute device with streams: fetched bytes come by asynchronous copies.
#pragma once

#include <c10/core/Storage.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/events.h"
#include "device/pinned.h"
#include "device/use_order.h"
#include "engine/donor.h"
#include "engine/ring.h"

namespace distorch {

// What waits for what is in Note [Order on streams] (device/use_order.h).
class Accelerator : public RingDevice {
 public:
  explicit Accelerator(c10::Device device);
  ~Accelerator() override;  // waits for copies through its own buffers

  uint64_t granule() const override { return 512; }
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override;
  std::shared_ptr<void> wrap(Slot& slot, std::byte* data, uint64_t bytes,
                             std::shared_ptr<void> block) override;
  bool in_use(const std::shared_ptr<void>& wrapped) const override;
  bool is_host() const override { return false; }
  bool brings(const Donor& donor) const override;
  bool recording() const override;
  std::shared_ptr<Staged> staging(uint64_t bytes) override { return buffers_->take(bytes); }
  bool in_parts() const override { return true; }
  void bring(const std::shared_ptr<Slot>& slot, Range part) override;
  void took(Slot& slot) override;
  void flush(std::vector<std::shared_ptr<Slot>>* failed) override;
  void dropped(Slot& slot) override;
  bool waits(Slot& slot) override;
  void lend(Slot& slot, Counters& counters) override;

 private:
  // A copy that was asked for; neighbours become one.
  struct Copy {
    const std::byte* from;
    const void* owner;
    std::byte* to;
    uint64_t bytes;
    std::vector<std::shared_ptr<Slot>> slots;
    std::vector<const Readers*> readers;  // of the donors of these slots, or of their parts
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

  Link& link_from(const std::string& place);
  void issue_all(Link& link, std::vector<std::shared_ptr<Slot>>* failed);
  void issue(Link& link, const Copy& copy);
  void send(Link& link, const Copy& copy);
  void bounce(Link& link, const Copy& copy);
  void arrived(Link& link, const Copy& copy, const EventPtr& event);
  void decode(const std::shared_ptr<Slot>& slot);
  bool answers() const;

  const c10::Device device_;
  const c10::impl::VirtualGuardImpl guard_;
  const std::shared_ptr<UseOrder> order_;
  const std::shared_ptr<PinnedBuffers> buffers_;
  // Guarded by the ring's mutex, as all calls are.
  std::map<std::string, Link> links_;
  std::optional<c10::Stream> decoding_;
  std::vector<std::shared_ptr<Slot>> to_decode_;  // asked for, since the last flush
};

}  // namespace distorch
