// SPDX-License-Identifier: Apache-2.0
// Donors: the places that keep the bytes of weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/file.h"
#include "core/mutex.h"

namespace distorch {

// The copies that devices make from one donor's memory. A device copies later than it was asked
// to, so whoever writes to that memory, or frees it, has to wait for these copies first.
class PendingCopies {
 public:
  class Copy {
   public:
    virtual ~Copy() = default;
    // Blocks until the copy has read its last byte, or never will.
    virtual void wait() = 0;
  };

  PendingCopies() = default;
  // Waits, as a last resort. Owners call Donor::settle() before, where they hold no lock.
  ~PendingCopies() { wait_for_all(); }
  PendingCopies(const PendingCopies&) = delete;
  PendingCopies& operator=(const PendingCopies&) = delete;

  // Copies on one stream run one after the other: the latest stands for all of them.
  void add(uint64_t stream, std::shared_ptr<Copy> copy) const;
  // Blocks until every copy has ended. The caller makes sure that no new one is asked for
  // meanwhile. REQUIRES: no mutex of ours is held (Note [Waiting for threads]).
  void wait() const;

 private:
  void wait_for_all() const;

  mutable Mutex mutex_;  // not held while waiting
  mutable std::vector<std::pair<uint64_t, std::shared_ptr<Copy>>> latest_ GUARDED_BY(mutex_);
};

// A piece of a weight that a device can copy by itself. `place` is "cpu" or a
// device ("sim:1"); pieces with one owner may be copied together where they lie
// side by side. `pending` is told of each copy; it is null for memory that is no donor's.
struct Extent {
  uint64_t begin, bytes;
  std::string place;
  const std::byte* data;
  const void* owner;
  const PendingCopies* pending;
};

// What of these pieces lies within a part of the weight, in their order. An empty piece does, at
// any place within.
std::vector<Extent> within(std::vector<Extent> extents, Range part);

// Bytes between two pieces if one copy may bring both: the second one lies behind the first, where
// it comes from as where it goes to, and not far. Nothing if not. `from_end` and `to_end` are where
// the first one ends.
std::optional<uint64_t> gap_between(const std::byte* from_end, const std::byte* to_end,
                                    const std::byte* from, const std::byte* to);

// One weight's bytes on a donor. Thread-safe for reads; writes are as safe as
// writes to a plain tensor, that is, they are the caller's to order.
class Donor {
 public:
  virtual ~Donor() = default;

  virtual std::string tier() const = 0;  // "cpu", "disk", a device
  virtual uint64_t size() const = 0;     // bytes
  // For error messages: where the bytes are, in words.
  virtual std::string describe() const = 0;

  // The bytes themselves where the CPU may use them in place, else null.
  virtual std::byte* host() { return nullptr; }
  // The bytes as host memory that costs nothing until it is touched, valid
  // while the donor lives. Throws Error(kFetch).
  virtual std::shared_ptr<std::byte> map() = 0;
  // Where a device finds the bytes, in order and without a gap; empty when
  // reader threads have to bring them.
  virtual std::vector<Extent> extents() const { return {}; }
  // The remainder modulo kPage that the address of a reader's buffer should
  // have so that bytes travel without a copy.
  virtual uint64_t phase() const { return 0; }

  // Blocking. Reads exactly [begin, begin + bytes); `slack` as in File::read.
  // Throws Error(kFetch).
  virtual void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const = 0;

  // The same for a large range and a caller that waits: by several threads.
  virtual void read_range(uint64_t begin, uint64_t bytes, std::byte* into) const {
    read(begin, bytes, into, false);
  }

  // Blocks until no device copies from here any more. Call it before letting go of a donor.
  // REQUIRES: no mutex of ours is held (Note [Waiting for threads]).
  virtual void settle() const {}

  // Rows of that many bytes, those of these numbers, one after the other.
  // REQUIRES: they are within the donor. Throws Error(kFetch).
  virtual void gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const;

  // A donor that is somebody's checkpoint is never written.
  virtual bool writable() const = 0;
  // Waits for copies that devices still make of the old bytes.
  // REQUIRES: writable(). Throws Error(kFetch).
  virtual void write(uint64_t begin, uint64_t bytes, const std::byte* from) = 0;
};

class HostDonor : public Donor {
 public:
  // `data` stays valid as long as `owner` lives. `owner_id` is the same for
  // donors in one piece of memory.
  HostDonor(std::shared_ptr<void> owner, std::byte* data, uint64_t bytes,
            const void* owner_id = nullptr)
      : owner_(std::move(owner)),
        owner_id_(owner_id != nullptr ? owner_id : owner_.get()),
        data_(data),
        bytes_(bytes) {}

  // Ordinary memory of its own.
  static std::shared_ptr<HostDonor> make(uint64_t bytes);

  std::string tier() const override { return "cpu"; }
  uint64_t size() const override { return bytes_; }
  std::string describe() const override { return "host memory"; }
  std::byte* host() override { return data_; }
  std::vector<Extent> extents() const override {
    return {{0, bytes_, "cpu", data_, owner_id_, &pending_}};
  }
  std::shared_ptr<std::byte> map() override;
  void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const override;
  void settle() const override { pending_.wait(); }
  bool writable() const override { return true; }
  void write(uint64_t begin, uint64_t bytes, const std::byte* from) override;

 private:
  const std::shared_ptr<void> owner_;
  const void* const owner_id_;
  std::byte* const data_;
  const uint64_t bytes_;
  const PendingCopies pending_;  // last: it waits before the memory goes
};

// The folder of the scratch file, which has the bytes of donors that are nobody's checkpoint.
void set_scratch_directory(std::string directory);
std::string scratch_directory();

class FileDonor : public Donor {
 public:
  // A range of a checkpoint, read where it lies. Throws Error(kFormat) when
  // the range is not inside the file.
  FileDonor(std::shared_ptr<File> checkpoint, uint64_t offset, uint64_t bytes);
  // A range of its own in this process's scratch file. Throws Error(kPlacement) when the disk is
  // full.
  static std::shared_ptr<FileDonor> scratch(uint64_t bytes);
  ~FileDonor() override;

  std::string tier() const override { return "disk"; }
  uint64_t size() const override { return bytes_; }
  std::string describe() const override;
  uint64_t phase() const override { return offset_ % kPage; }
  std::shared_ptr<std::byte> map() override { return file_->map(offset_, bytes_); }
  void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const override;
  void read_range(uint64_t begin, uint64_t bytes, std::byte* into) const override;
  // All of it; a page on either side of `into` may be overwritten.
  void read_whole(std::byte* into) const;
  bool writable() const override { return file_->writable(); }
  bool is_checkpoint() const { return file_->is_checkpoint(); }
  void write(uint64_t begin, uint64_t bytes, const std::byte* from) override;

  const std::string& path() const { return file_->path(); }
  uint64_t offset() const { return offset_; }

 private:
  const std::shared_ptr<File> file_;
  const uint64_t offset_;
  const uint64_t bytes_;
};

// A weight in consecutive pieces, each on a donor of its own.
class StripedDonor : public Donor {
 public:
  explicit StripedDonor(std::vector<std::shared_ptr<Donor>> parts);

  std::string tier() const override { return tier_; }
  uint64_t size() const override { return bytes_; }
  std::string describe() const override { return "stripes on " + tier_; }
  std::vector<Extent> extents() const override;
  std::shared_ptr<std::byte> map() override;
  void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const override;
  void settle() const override;
  bool writable() const override { return true; }
  void write(uint64_t begin, uint64_t bytes, const std::byte* from) override;

 private:
  template <class Visit>
  void for_each_part(uint64_t begin, uint64_t bytes, Visit&& visit) const;

  const std::vector<std::shared_ptr<Donor>> parts_;
  std::string tier_;
  uint64_t bytes_ = 0;
};

}  // namespace distorch
