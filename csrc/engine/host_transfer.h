// SPDX-License-Identifier: Apache-2.0
// Slots in host memory: readers fill them, and whoever asks for a weight decodes it.
#pragma once

#include <memory>
#include <string>

#include "engine/transfer.h"

namespace distorch {

// Note [Who decodes]
// On an accelerator the device decodes, behind its copies. On the host, readers only read. The
// thread that asks for a weight decodes it, with all threads that its operators have. Readers must
// not decode ahead: the operator that is running uses all cores, and its threads spin while they
// wait for each other, so a reader that takes one core delays all of them. What remains to overlap
// is what costs no core.
//
// So what is read ahead needs no more room than the donor's bytes. A large weight gets the room of
// its decoded bytes when somebody asks for it. Bytes that are read ahead lie at the end of the ring
// and leave a hole in front of them (SlotCache keeps it open). The hole is as large as the largest
// decoded weight. If an operator wanted several weights at once and found no room for them, it is
// as large as all of these. It is never more than half of the ring. Weights are decoded there again
// and again, which finds that memory in the caches. Small weights have room for both forms from the
// start. Of weights in host memory nothing is brought ahead.
class HostTransfer : public Transfer {
 public:
  bool brings_ahead(const Source& source) const override { return !source.decodes_memory(); }
  SlotPtr make_slot(const std::string& name, Source source, uint64_t large) final;
  void place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) final;
  void start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) final;
  void was_read(const SlotPtr& slot, std::optional<Failure> failure) final;
  void grew(const SlotPtr&, Range) final {}  // rooms are whole from the start
  void decode(Slot& slot, RingMutex::Lock& lock) final;

 protected:
  // An object over [data, data + bytes) that keeps `block` alive, for operators.
  virtual std::shared_ptr<void> wrap(std::byte* data, uint64_t bytes,
                                     std::shared_ptr<void> block) = 0;
  // All rows, by the calling thread, without the ring's mutex. Throws Error.
  virtual void decode_all(const Decoder& decoder, const std::byte* encoded, std::byte* into) = 0;
};

}  // namespace distorch
