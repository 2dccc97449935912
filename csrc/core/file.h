// SPDX-License-Identifier: Apache-2.0
// A file that donors read from: large unbuffered reads that leave the page
// cache alone, buffered ones where the bytes are already cached.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/alignment.h"
#include "core/checksum.h"
#include "core/mutex.h"

namespace distorch {

class File {
 public:
  // An existing file for reading, the same object for all who read it as it is
  // now: weights by the thousand take one descriptor. Throws Error(kFormat) when
  // it cannot be opened.
  static std::shared_ptr<File> open(const std::string& path);
  // A new file without a name in `directory`: it vanishes with this object,
  // however the process ends. Throws Error(kPlacement) when it cannot.
  static std::shared_ptr<File> scratch(const std::string& directory);

  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  // A scratch file belongs to the process that made it: a fork's child reads it.
  bool writable() const;
  // Whether the bytes are somebody's file and not scratch.
  bool is_checkpoint() const { return !writable_; }

  // From now on all who read this file have its bytes compared with these sums first. Where there
  // are sums already, they stay. Throws Error(kFormat) if they are not of a file of this size.
  void verify_with(Checksums sums);

  // Reads exactly [offset, offset + bytes) into `into`. Thread-safe.
  // When `into` and `offset` agree modulo kPage the bytes travel without a
  // copy, and up to a page on either side of `into` may be overwritten if
  // `slack` says that this memory belongs to the caller.
  // Throws Error(kFetch) on a short read, an I/O error, or when the file is
  // not the one that was opened any more (size, modification time, or sums).
  void read(uint64_t offset, uint64_t bytes, std::byte* into, bool slack) const;

  // The bytes as copy-on-write memory, read from the file when touched. A file with sums is read
  // and compared before: later changes of bytes that were not touched yet are not noticed.
  // Throws Error(kFetch) when the file is not the one that was opened.
  std::shared_ptr<std::byte> map(uint64_t offset, uint64_t bytes) const;

  // Scratch files only. Reserves room on the disk, so that a full one is known
  // here; returns the offset (a multiple of kPage). Throws Error(kPlacement).
  uint64_t allocate(uint64_t bytes);
  // Gives the room back to the file system.
  void release(uint64_t offset, uint64_t bytes);
  // Writes exactly the given bytes. Throws Error(kFetch).
  void write(uint64_t offset, uint64_t bytes, const std::byte* from);

 private:
  File(std::string path, int fd, bool writable);
  bool is_still(const struct stat& status) const;
  void check_unchanged() const;
  std::shared_ptr<const Checksums> sums() const;
  void compare(const Checksums& sums, size_t block, const std::byte* read) const;
  const std::byte* compared_block(const Checksums& sums, size_t block) const;
  void read_compared(const Checksums& sums, uint64_t offset, uint64_t bytes, std::byte* into,
                     bool slack) const;
  void read_plain(uint64_t offset, uint64_t bytes, std::byte* into, bool slack) const;
  bool is_cached(uint64_t offset, uint64_t bytes) const;
  void read_buffered(uint64_t offset, uint64_t bytes, std::byte* into) const;
  bool read_direct(uint64_t begin, uint64_t end, std::byte* into) const;
  void read_bounced(uint64_t offset, uint64_t bytes, std::byte* into) const;

  const std::string path_;
  const int fd_;
  int direct_fd_ = -1;   // -1: the file system has no unbuffered reads
  void* map_ = nullptr;  // never touched: only asked what is cached
  uint64_t map_bytes_ = 0;
  std::atomic<uint64_t> size_{0};  // scratch files grow under mutex_
  dev_t device_ = 0;
  ino_t inode_ = 0;
  int64_t modified_ns_ = 0;
  const bool writable_;
  const pid_t owner_;
  const uint64_t forks_before_;
  mutable Mutex mutex_;
  // Null: nobody wants the bytes compared.
  std::shared_ptr<const Checksums> sums_ GUARDED_BY(mutex_);
};

}  // namespace distorch
