// SPDX-License-Identifier: Apache-2.0
#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <vector>

#include "core/checksum.h"
#include "core/error.h"
#include "core/forks.h"
#include "core/host_memory.h"
#include "core/mutex.h"
#include "core/stream_copy.h"

namespace distorch {
namespace {

constexpr uint64_t kBounceBytes = 1 << 20;

std::string reason(int error) { return std::strerror(error); }

int64_t nanoseconds(const struct timespec& time) {
  return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

OwnMemory aligned_memory(uint64_t bytes) {
  OwnMemory memory(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// The kernel answers "all cached" about files it may not tell us about.
bool may_ask_cache(int fd, const struct stat& status) {
  return status.st_uid == geteuid() || (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
}

int reopen_unbuffered(int fd) {
  const std::string self = "/proc/self/fd/" + std::to_string(fd);
  const int direct = ::open(self.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (direct < 0) return -1;
  // Some file systems accept the flag and refuse the first read.
  const OwnMemory probe = aligned_memory(kPage);
  if (::pread(direct, probe.get(), kPage, 0) >= 0) return direct;
  ::close(direct);
  return -1;
}

// Memory of its own for each reading thread.
std::byte* bounce_buffer() {
  static_assert(kBounceBytes + 2 * kPage <= kHugePage);
  thread_local const OwnMemory buffer = huge_pages(kHugePage);
  return buffer.get();
}

// Files that somebody reads from, by path. A path may have several: a file that was changed and got
// its old time back must be found again, with its checksums, and not opened anew without them.
struct OpenFiles {
  Mutex mutex;
  std::multimap<std::string, std::weak_ptr<File>> by_path GUARDED_BY(mutex);
};

// Never destroyed: files may outlive every static object.
OpenFiles& open_files = *new OpenFiles;

}  // namespace

File::File(std::string path, int fd, bool writable)
    : path_(std::move(path)),
      fd_(fd),
      writable_(writable),
      owner_(::getpid()),
      forks_before_(forks::count()) {
  struct stat status{};
  ::fstat(fd_, &status);
  device_ = status.st_dev;
  inode_ = status.st_ino;
  size_ = static_cast<uint64_t>(status.st_size);
  modified_ns_ = nanoseconds(status.st_mtim);
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
  direct_fd_ = reopen_unbuffered(fd_);
  if (!writable_ && size_ > 0 && may_ask_cache(fd_, status)) {
    void* map = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
    if (map != MAP_FAILED) map_ = map, map_bytes_ = size_;
  }
}

File::~File() {
  if (map_ != nullptr) ::munmap(map_, map_bytes_);
  if (direct_fd_ >= 0) ::close(direct_fd_);
  ::close(fd_);
}

bool File::is_still(const struct stat& status) const {
  return status.st_dev == device_ && status.st_ino == inode_ &&
         static_cast<uint64_t>(status.st_size) == size_ &&
         nanoseconds(status.st_mtim) == modified_ns_;
}

std::shared_ptr<File> File::open(const std::string& path) {
  // Without O_NONBLOCK, a named pipe under this path would keep us waiting for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) {
    throw Error(ErrorKind::kFormat, "cannot open '" + path + "': " + reason(errno));
  }
  struct stat status{};
  ::fstat(fd, &status);
  if (!S_ISREG(status.st_mode)) {
    ::close(fd);
    throw Error(ErrorKind::kFormat,
                "cannot open '" + path + "': no ordinary file, but a folder, a pipe or a device");
  }
  const MutexLock lock(open_files.mutex);
  std::erase_if(open_files.by_path, [](const auto& entry) { return entry.second.expired(); });
  const auto [begin, end] = open_files.by_path.equal_range(path);
  for (auto known = begin; known != end; ++known) {
    if (auto file = known->second.lock(); file != nullptr && file->is_still(status)) {
      ::close(fd);
      return file;
    }
  }
  std::shared_ptr<File> file(new File(path, fd, false));
  open_files.by_path.emplace(path, file);
  return file;
}

std::shared_ptr<File> File::scratch(const std::string& directory) {
  // Without a name from the beginning, where the file system can: a process that is killed between
  // two calls leaves nothing behind.
  const int nameless = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (nameless >= 0) return std::shared_ptr<File>(new File(directory, nameless, true));
  std::string path = directory + "/distorch-XXXXXX";
  std::vector<char> name(path.begin(), path.end());
  name.push_back('\0');
  const int fd = ::mkostemp(name.data(), O_CLOEXEC);
  if (fd < 0) {
    throw Error(ErrorKind::kPlacement, "cannot create a donor file in '" + directory +
                                           "': " + reason(errno) +
                                           "; set DISTORCH_DISK to a folder on a disk with room");
  }
  ::unlink(name.data());
  return std::shared_ptr<File>(new File(directory, fd, true));
}

void File::check_unchanged() const {
  if (writable_) return;
  struct stat status{};
  if (::fstat(fd_, &status) != 0) {
    throw Error(ErrorKind::kFetch, "cannot look at '" + path_ + "': " + reason(errno));
  }
  const auto size = static_cast<uint64_t>(status.st_size);
  if (size != size_) {
    throw Error(ErrorKind::kFetch, "'" + path_ + "' held " + std::to_string(size_) +
                                       " bytes when it was opened and holds " +
                                       std::to_string(size) +
                                       " now; put the file back and load the model again");
  }
  if (nanoseconds(status.st_mtim) != modified_ns_) {
    throw Error(ErrorKind::kFetch, "'" + path_ +
                                       "' was written to after it was opened, so its weights are "
                                       "not the loaded ones any more; load the model again");
  }
}

bool File::is_cached(uint64_t offset, uint64_t bytes) const {
  if (map_ == nullptr) return false;
  const uint64_t begin = round_down(offset, kPage);
  const uint64_t end = std::min(offset + bytes, map_bytes_);
  if (begin >= end) return false;
  thread_local std::vector<unsigned char> pages;
  pages.resize(round_up(end - begin, kPage) / kPage);
  if (::mincore(static_cast<char*>(map_) + begin, end - begin, pages.data()) != 0) return false;
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

void File::verify_with(Checksums sums) {
  const uint64_t end = sums.ends.empty() ? 0 : sums.ends.back();
  if (end != size_ || sums.ends.size() != sums.sums.size()) {
    throw Error(ErrorKind::kFormat,
                "'" + path_ + "' has " + std::to_string(size_) + " bytes in " +
                    std::to_string(sums.ends.size()) + " blocks, and there are checksums of " +
                    std::to_string(sums.sums.size()) + " up to byte " + std::to_string(end));
  }
  auto shared = std::make_shared<const Checksums>(std::move(sums));
  const MutexLock lock(mutex_);
  if (sums_ == nullptr) sums_ = std::move(shared);
}

std::shared_ptr<const Checksums> File::sums() const {
  if (writable_) return nullptr;  // a scratch file
  const MutexLock lock(mutex_);
  return sums_;
}

// `read` is what was read of that block, whole.
void File::compare(const Checksums& sums, size_t block, const std::byte* read) const {
  const uint64_t begin = sums.begin_of(block), end = sums.ends[block];
  if (checksum(read, end - begin) == sums.sums[block]) return;
  throw Error(ErrorKind::kFetch,
              "bytes " + std::to_string(begin) + " to " + std::to_string(end) + " of '" + path_ +
                  "' are not what they were when the file was verified first. The disk or the "
                  "memory may be failing, or a program wrote there and put the file's time back. "
                  "Get the file again");
}

// Reads a block whole. It stands in memory of this thread, which the thread's next call uses again.
const std::byte* File::compared_block(const Checksums& sums, size_t block) const {
  thread_local const OwnMemory memory = aligned_memory(kSummed);
  const uint64_t begin = sums.begin_of(block);
  read_plain(begin, sums.ends[block] - begin, memory.get(), false);
  compare(sums, block, memory.get());
  return memory.get();
}

// Whole blocks go straight into place. Of a block of which the range has a part, all is read beside
// it, since a checksum is one of the whole block.
void File::read_compared(const Checksums& sums, uint64_t offset, uint64_t bytes, std::byte* into,
                         bool slack) const {
  const uint64_t end = offset + bytes;
  for (uint64_t at = offset; at < end;) {
    // `last`: the first block that is not whole in the range.
    const size_t first = sums.block_at(at), last = sums.block_at(end);
    std::byte* const to = into + (at - offset);
    if (at == sums.begin_of(first) && first < last) {
      const uint64_t whole = sums.begin_of(last);
      // Behind the first block, slack could overwrite bytes that are compared already.
      read_plain(at, whole - at, to, slack && at == offset);
      for (size_t block = first; block < last; ++block) {
        compare(sums, block, to + (sums.begin_of(block) - at));
      }
      at = whole;
    } else {
      const uint64_t stop = std::min(end, sums.ends[first]);
      std::memcpy(to, compared_block(sums, first) + (at - sums.begin_of(first)), stop - at);
      at = stop;
    }
  }
}

void File::read(uint64_t offset, uint64_t bytes, std::byte* into, bool slack) const {
  check_unchanged();
  if (offset > size_ || bytes > size_ - offset) {
    throw Error(ErrorKind::kFetch, "bytes " + std::to_string(offset) + " to " +
                                       std::to_string(offset + bytes) + " of '" + path_ +
                                       "', which has " + std::to_string(size_));
  }
  if (const auto known = sums(); known != nullptr) {
    return read_compared(*known, offset, bytes, into, slack);
  }
  read_plain(offset, bytes, into, slack);
}

void File::read_plain(uint64_t offset, uint64_t bytes, std::byte* into, bool slack) const {
  if (direct_fd_ < 0 || is_cached(offset, bytes)) return read_buffered(offset, bytes, into);
  const uint64_t lead = offset % kPage;
  const bool in_phase = reinterpret_cast<uintptr_t>(into) % kPage == lead;
  const bool whole_pages = lead == 0 && bytes % kPage == 0;
  if (in_phase && (slack || whole_pages)) {
    const uint64_t end = round_up(offset + bytes, kPage);
    if (read_direct(offset - lead, end, into - lead)) return;
  }
  read_bounced(offset, bytes, into);
}

// Whole pages straight into place. False: not possible, nothing is promised
// about the memory and the caller reads in another way.
bool File::read_direct(uint64_t begin, uint64_t end, std::byte* into) const {
  uint64_t at = begin;
  while (at < end) {
    const ssize_t got = ::pread(direct_fd_, into + (at - begin), end - at, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    // EFAULT: the disk cannot write to this memory (some of a driver's). Buffered reads can.
    if (got < 0 && (errno == EINVAL || errno == EFAULT)) return false;
    if (got < 0) throw Error(ErrorKind::kFetch, "reading '" + path_ + "': " + reason(errno));
    at += static_cast<uint64_t>(got);
    if (got == 0 || at % kPage != 0) break;  // the end of the file
  }
  if (at >= end || at >= size_) return true;
  check_unchanged();
  return false;
}

void File::read_bounced(uint64_t offset, uint64_t bytes, std::byte* into) const {
  std::byte* bounce = bounce_buffer();
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t at = offset + done;
    const uint64_t lead = at % kPage;
    const uint64_t part = std::min(bytes - done, kBounceBytes);
    if (!read_direct(at - lead, round_up(at + part, kPage), bounce)) {
      return read_buffered(at, bytes - done, into + done);
    }
    stream_copy(into + done, bounce + lead, part);
    done += part;
  }
}

void File::read_buffered(uint64_t offset, uint64_t bytes, std::byte* into) const {
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t got = ::pread(fd_, into + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(ErrorKind::kFetch, "reading '" + path_ + "': " + reason(errno));
    if (got == 0) {
      throw Error(ErrorKind::kFetch, "'" + path_ + "' ends " + std::to_string(bytes - done) +
                                         " bytes before the end of the weight at byte " +
                                         std::to_string(offset));
    }
    done += static_cast<uint64_t>(got);
  }
}

std::shared_ptr<std::byte> File::map(uint64_t offset, uint64_t bytes) const {
  check_unchanged();
  if (const auto known = sums(); known != nullptr) {
    for (size_t block = known->block_at(offset); known->begin_of(block) < offset + bytes; ++block) {
      static_cast<void>(compared_block(*known, block));
    }
  }
  const uint64_t lead = offset % kPage;
  const uint64_t length = std::max<uint64_t>(lead + bytes, 1);
  void* map = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd_,
                     static_cast<off_t>(offset - lead));
  if (map == MAP_FAILED) {
    throw Error(ErrorKind::kFetch, "cannot map '" + path_ + "': " + reason(errno));
  }
  auto* data = static_cast<std::byte*>(map) + lead;
  return {data, [map, length](std::byte*) { ::munmap(map, length); }};
}

uint64_t File::allocate(uint64_t bytes) {
  const MutexLock lock(mutex_);
  const uint64_t offset = size_;
  const uint64_t room = round_up_room(bytes, kPage);
  const int error = ::posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(room));
  if (error != 0) {
    throw Error(ErrorKind::kPlacement, "the disk under '" + path_ + "' has no room for " +
                                           std::to_string(room) + " bytes: " + reason(error) +
                                           "; free some, or set DISTORCH_DISK to another folder");
  }
  size_ += room;
  return offset;
}

bool File::writable() const { return writable_ && owner_ == ::getpid(); }

void File::release(uint64_t offset, uint64_t bytes) {
  // A child may still read there; its blocks go with the file.
  if (!writable() || forks_before_ != forks::count()) return;
  const uint64_t room = round_up_room(bytes, kPage);
  // A failure only keeps blocks until the file vanishes.
  (void)::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                    static_cast<off_t>(room));
}

void File::write(uint64_t offset, uint64_t bytes, const std::byte* from) {
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t put = ::pwrite(fd_, from + done, bytes - done, static_cast<off_t>(offset + done));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      throw Error(ErrorKind::kFetch, "writing " + std::to_string(bytes) + " bytes under '" + path_ +
                                         "': " + reason(errno));
    }
    done += static_cast<uint64_t>(put);
  }
}

}  // namespace distorch
