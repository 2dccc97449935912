// SPDX-License-Identifier: Apache-2.0
// Donors in memory that PyTorch has allocated, and which devices reach each other.
#pragma once

#include <c10/core/Storage.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/source.h"

namespace distorch {

// Host memory of a storage: all of it, or `bytes` from `begin` on.
class StorageDonor : public HostDonor {
 public:
  explicit StorageDonor(const c10::Storage& storage) : StorageDonor(storage, 0, storage.nbytes()) {}
  StorageDonor(const c10::Storage& storage, uint64_t begin, uint64_t bytes)
      : HostDonor(std::make_shared<c10::Storage>(storage),
                  static_cast<std::byte*>(storage.mutable_data()) + begin, bytes,
                  storage.unsafeGetStorageImpl()),
        storage_(storage) {}

  const c10::Storage& storage() const { return storage_; }

 private:
  const c10::Storage storage_;
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
  void settle() const override { pending_.wait(); }
  bool writable() const override { return true; }
  void write(uint64_t begin, uint64_t bytes, const std::byte* from) override;

  const c10::Storage& storage() const { return storage_; }

 private:
  const c10::Storage storage_;
  const PendingCopies pending_;  // last: it waits before the memory goes
};

// The memory of a source that operators on `compute` can use where it is, or null.
c10::Storage in_place_memory(const Source& source, c10::Device compute);

// Note [Peers]
// at::copy_ between two devices runs on the source's, whose copy engine writes
// to the target's memory; it enables the access the first time, for memory of
// expandable segments, too. So what is asked is whether `from` can access the
// memory of `to`. Where it cannot, CUDA would bounce the bytes through host
// memory, and the host might wait; we do that ourselves, on streams.

// Whether `from` can write to the memory of `to` by itself. Unless told, it can.
void set_peer_access(const std::string& to, const std::string& from, bool possible);
bool can_reach(const std::string& to, const std::string& from);

}  // namespace distorch
