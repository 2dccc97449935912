// A compute device with streams: fetched bytes come by asynchronous copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/donor.h"
#include "engine/ring.h"

namespace distorch {

// Note [Order on streams]
// * Bytes travel on a stream of their own for each place they come from.
// * A refill waits for what was issued, before it, on every stream that was
//   lent slots: one event per stream and refill, none per operator. What readers
//   bring is copied later than its room was taken, and waits for what was issued
//   before that.
// * Operators wait for the event behind the copy of their weight, on the
//   stream that is current when they ask; the host waits for nothing.
// * A copy to memory that was refilled without ever being lent is waited for by
//   the refill, whatever link it comes from.
// * Weights that are not kept as they are get decoded on one more stream,
//   behind their copies; they have arrived when that is done.
// * The region is told of every stream that uses it, so that its allocator
//   does not give it to somebody else too early.
class Accelerator : public RingDevice {
 public:
  explicit Accelerator(c10::Device device);

  uint64_t granule() const override { return 512; }
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override;
  std::shared_ptr<void> wrap(std::byte* data, uint64_t bytes, std::shared_ptr<void> block) override;
  bool in_use(const std::shared_ptr<void>& wrapped) const override;
  bool is_host() const override { return false; }
  bool brings(const Donor& donor) const override;
  bool recording() const override;
  std::shared_ptr<Staged> staging(uint64_t bytes) override;
  bool in_parts() const override { return true; }
  void bring(const std::shared_ptr<Slot>& slot, const Donor& donor, Range part) override;
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
  };
  // Two buffers in host memory for a device that this one cannot reach.
  struct Bounce {
    at::Tensor buffer[2];
    c10::Event free[2];
    size_t next = 0;
  };
  struct Link {
    c10::Device from;
    c10::Stream stream;                 // of this device
    std::optional<c10::Stream> source;  // of the donor's device
    std::vector<Copy> waiting;
    // Copies of other links to memory that nobody used since.
    std::vector<std::shared_ptr<c10::Event>> orphans;
    std::optional<Bounce> bounce;
  };
  struct StagingPool;
  struct PinnedStaging;

  Link& link_from(const std::string& place);
  bool issue(Link& link, const Copy& copy);
  void bounce(Link& link, const Copy& copy);
  void decode(const std::shared_ptr<Slot>& slot);
  c10::Stream& decoding_stream();
  void add_orphan(const std::shared_ptr<c10::Event>& copied);
  void wait_for_users(const c10::Stream& stream);
  void use_on(const c10::Stream& stream);

  const c10::Device device_;
  const c10::impl::VirtualGuardImpl guard_;
  mutable std::atomic<bool> knows_recording_ = true;  // some backends cannot tell
  std::map<std::string, Link> links_;
  std::optional<c10::Stream> decoding_;
  std::vector<std::shared_ptr<Slot>> to_decode_;  // asked for, since the last flush
  std::vector<c10::Stream> users_;                // that were lent slots
  std::vector<std::weak_ptr<c10::Storage>> blocks_;
  std::shared_ptr<StagingPool> staging_;
};

// Bytes on a device.
class DeviceDonor : public Donor {
 public:
  explicit DeviceDonor(c10::Storage storage);

  std::string tier() const override;
  uint64_t size() const override { return storage_.nbytes(); }
  std::string describe() const override { return "the memory of " + tier(); }
  std::vector<Extent> extents() const override;
  std::shared_ptr<std::byte> map() override;
  void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const override;
  void gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const override;
  bool writable() const override { return true; }
  void write(uint64_t begin, uint64_t bytes, const std::byte* from) override;

  const c10::Storage& storage() const { return storage_; }

 private:
  const c10::Storage storage_;
};

// Note [Peers]
// at::copy_ between two devices runs on the source's, whose copy engine writes
// to the target's memory; it enables the access the first time, for memory of
// expandable segments, too. So what is asked is whether `from` can access the
// memory of `to`. Where it cannot, CUDA would bounce the bytes through host
// memory, and the host might wait; we do that ourselves, on streams.

// Whether `from` can write to the memory of `to` by itself. Unless told, it can.
void set_peer_access(const std::string& to, const std::string& from, bool possible);

}  // namespace distorch
