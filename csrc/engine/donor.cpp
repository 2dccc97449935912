// SPDX-License-Identifier: Apache-2.0
#include "engine/donor.h"

#include <algorithm>
#include <cstring>

#include "core/bulk_read.h"
#include "core/error.h"
#include "core/host_access.h"
#include "core/mutex.h"
#include "engine/waiting.h"

namespace distorch {
namespace {

constexpr size_t kBulkThreads = 4;
constexpr uint64_t kMergeGap = 512;  // padding between neighbours that is copied along

struct Scratch {
  Mutex mutex;
  std::string directory GUARDED_BY(mutex) = "/tmp";
  std::weak_ptr<File> file GUARDED_BY(mutex);
};

// Never destroyed: donors may outlive every static object.
Scratch& shared = *new Scratch;

}  // namespace

std::vector<Extent> within(std::vector<Extent> extents, Range part) {
  std::vector<Extent> found;
  for (Extent& extent : extents) {
    const uint64_t from = std::max(part.begin, extent.begin);
    const uint64_t to = std::min(part.end, extent.begin + extent.bytes);
    if (from > to || (from == to && extent.bytes > 0)) continue;
    extent.data += from - extent.begin;
    extent.begin = from;
    extent.bytes = to - from;
    found.push_back(std::move(extent));
  }
  return found;
}

std::optional<uint64_t> gap_between(const std::byte* from_end, const std::byte* to_end,
                                    const std::byte* from, const std::byte* to) {
  if (to < to_end) return std::nullopt;
  const auto gap = static_cast<uint64_t>(to - to_end);
  return gap < kMergeGap && from == from_end + gap ? std::optional(gap) : std::nullopt;
}

void Donor::gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const {
  for (const int64_t row : rows) {
    read(static_cast<uint64_t>(row) * row_bytes, row_bytes, into, false);
    into += row_bytes;
  }
}

void PendingCopies::add(uint64_t stream, std::shared_ptr<Copy> copy) const {
  const MutexLock lock(mutex_);
  for (auto& [known, latest] : latest_) {
    if (known == stream) {
      latest.swap(copy);
      return;
    }
  }
  latest_.emplace_back(stream, std::move(copy));
}

void PendingCopies::wait() const {
  {
    const MutexLock lock(mutex_);
    if (latest_.empty()) return;
  }
  waiting([this] { wait_for_all(); });
}

void PendingCopies::wait_for_all() const {
  std::vector<std::pair<uint64_t, std::shared_ptr<Copy>>> under_way;
  {
    const MutexLock lock(mutex_);
    under_way.swap(latest_);
  }
  for (const auto& [stream, copy] : under_way) copy->wait();
}

std::shared_ptr<HostDonor> HostDonor::make(uint64_t bytes) {
  const std::shared_ptr<std::byte[]> memory(new std::byte[bytes]);
  return std::make_shared<HostDonor>(memory, memory.get(), bytes);
}

void HostDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool) const {
  host_reads(data_ + begin, bytes, "reading a donor");
  std::memcpy(into, data_ + begin, bytes);
}

std::shared_ptr<std::byte> HostDonor::map() {
  host_reads(data_, bytes_, "mapping a donor");
  return {owner_, data_};
}

void HostDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  pending_.wait();
  if (data_ + begin == from) return;
  host_reads(from, bytes, "reading what a donor gets");
  host_writes(data_ + begin, bytes, "writing to a donor");
  std::memmove(data_ + begin, from, bytes);
}

FileDonor::FileDonor(std::shared_ptr<File> checkpoint, uint64_t offset, uint64_t bytes)
    : file_(std::move(checkpoint)), offset_(offset), bytes_(bytes) {
  if (offset_ > file_->size() || bytes_ > file_->size() - offset_) {
    throw Error(ErrorKind::kFormat, "'" + file_->path() + "' has " + std::to_string(file_->size()) +
                                        " bytes; a weight should lie at " +
                                        std::to_string(offset_) + " + " + std::to_string(bytes_) +
                                        ": the file is cut short or damaged");
  }
}

void set_scratch_directory(std::string directory) {
  const MutexLock lock(shared.mutex);
  shared.directory = std::move(directory);
  shared.file.reset();
}

std::string scratch_directory() {
  const MutexLock lock(shared.mutex);
  return shared.directory;
}

// All scratch donors share one file, which goes with the last of them. A forked child, which may
// not write to its parent's, makes one of its own.
std::shared_ptr<FileDonor> FileDonor::scratch(uint64_t bytes) {
  std::shared_ptr<File> file;
  {
    const MutexLock lock(shared.mutex);
    file = shared.file.lock();
    if (file == nullptr || !file->writable()) shared.file = file = File::scratch(shared.directory);
  }
  const uint64_t offset = file->allocate(bytes);
  return std::make_shared<FileDonor>(std::move(file), offset, bytes);
}

FileDonor::~FileDonor() {
  if (!file_->is_checkpoint()) file_->release(offset_, bytes_);
}

std::string FileDonor::describe() const {
  if (!file_->is_checkpoint()) return "a donor file under '" + file_->path() + "'";
  return "'" + file_->path() + "' at byte " + std::to_string(offset_);
}

void FileDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const {
  file_->read(offset_ + begin, bytes, into, slack);
}

void FileDonor::read_range(uint64_t begin, uint64_t bytes, std::byte* into) const {
  bulk_read(*file_, offset_ + begin, bytes, into, kBulkThreads);
}

void FileDonor::read_whole(std::byte* into) const {
  bulk_read(*file_, offset_, bytes_, into, kBulkThreads, true);
}

void FileDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  host_reads(from, bytes, "writing to a file");
  file_->write(offset_ + begin, bytes, from);
}

StripedDonor::StripedDonor(std::vector<std::shared_ptr<Donor>> parts) : parts_(std::move(parts)) {
  for (const auto& part : parts_) {
    tier_ += (tier_.empty() ? "" : "+") + part->tier();
    bytes_ += part->size();
  }
}

std::vector<Extent> StripedDonor::extents() const {
  std::vector<Extent> found;
  uint64_t begin = 0;
  for (const auto& part : parts_) {
    for (Extent extent : part->extents()) {
      if (extent.bytes == 0) continue;
      extent.begin += begin;
      found.push_back(std::move(extent));
    }
    begin += part->size();
  }
  return found;
}

template <class Visit>
void StripedDonor::for_each_part(uint64_t begin, uint64_t bytes, Visit&& visit) const {
  uint64_t part_begin = 0;
  for (const auto& part : parts_) {
    const uint64_t from = std::max(begin, part_begin);
    const uint64_t to = std::min(begin + bytes, part_begin + part->size());
    if (from < to) visit(*part, from - part_begin, to - from, from - begin);
    part_begin += part->size();
  }
}

void StripedDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool) const {
  for_each_part(begin, bytes, [&](Donor& part, uint64_t at, uint64_t count, uint64_t done) {
    part.read(at, count, into + done, false);
  });
}

void StripedDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  for_each_part(begin, bytes, [&](Donor& part, uint64_t at, uint64_t count, uint64_t done) {
    part.write(at, count, from + done);
  });
}

void StripedDonor::settle() const {
  for (const auto& part : parts_) part->settle();
}

std::shared_ptr<std::byte> StripedDonor::map() {
  std::shared_ptr<std::byte> copy(new std::byte[bytes_], std::default_delete<std::byte[]>());
  read(0, bytes_, copy.get(), false);
  return copy;
}

}  // namespace distorch
