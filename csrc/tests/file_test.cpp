// SPDX-License-Identifier: Apache-2.0
// Reads of any alignment, scratch files, and files that change behind our back.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "core/bulk_read.h"
#include "core/checksum.h"
#include "core/error.h"
#include "core/file.h"
#include "core/stream_copy.h"
#include "tests/check.h"

using namespace distorch;

namespace {

constexpr uint64_t kBytes = 3'000'001;

std::vector<std::byte> pattern(uint64_t bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> data(bytes);
  for (auto& value : data) value = static_cast<std::byte>(random());
  return data;
}

std::string write_file(const std::string& name, const std::vector<std::byte>& data) {
  std::ofstream(name, std::ios::binary)
      .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
  return name;
}

void forget_cached_pages(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY);
  ::fdatasync(fd);
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  ::close(fd);
}

void reads_of_any_alignment(bool cached) {
  const auto data = pattern(kBytes, 1);
  const std::string path = write_file("plain.bin", data);
  if (!cached) forget_cached_pages(path);
  const auto file = File::open(path);
  CHECK(file->size() == kBytes);
  std::mt19937_64 random(3);
  // A guard before and behind: reads without slack touch nothing else.
  constexpr uint64_t kGuard = 2 * kPage;
  std::vector<std::byte> memory(kBytes + 2 * kGuard + kPage);
  for (int i = 0; i < 300; ++i) {
    const uint64_t offset = random() % kBytes;
    const uint64_t bytes = std::min(random() % (i % 3 == 0 ? 100 : 600'000), kBytes - offset);
    std::byte* into = memory.data() + kGuard + random() % kPage;
    std::fill(memory.begin(), memory.end(), std::byte{0x5a});
    file->read(offset, bytes, into, false);
    CHECK(std::memcmp(into, data.data() + offset, bytes) == 0);
    CHECK(into[-1] == std::byte{0x5a});
    CHECK(into[bytes] == std::byte{0x5a});
    // With slack and the file's own phase: no copy, a page on either side.
    const auto base = reinterpret_cast<uintptr_t>(memory.data() + kGuard);
    into = memory.data() + kGuard + (kPage - base % kPage) % kPage + offset % kPage;
    file->read(offset, bytes, into, true);
    CHECK(std::memcmp(into, data.data() + offset, bytes) == 0);
    if (!cached && i % 50 == 0) forget_cached_pages(path);
  }
  std::vector<std::byte> whole(kBytes);
  bulk_read(*file, 0, kBytes, whole.data(), 4);
  CHECK(whole == data);
  const auto mapped = file->map(12345, 4321);
  CHECK(std::memcmp(mapped.get(), data.data() + 12345, 4321) == 0);
  CHECK_THROWS(kFetch, file->read(kBytes - 3, 4, memory.data(), false));
}

void scratch_file() {
  const auto file = File::scratch(".");
  const auto one = pattern(100'000, 4), two = pattern(70'000, 5);
  const uint64_t first = file->allocate(one.size()), second = file->allocate(two.size());
  CHECK(first % kPage == 0 && second % kPage == 0);
  file->write(first, one.size(), one.data());
  file->write(second, two.size(), two.data());
  std::vector<std::byte> back(one.size());
  file->read(first, one.size(), back.data(), false);
  CHECK(back == one);
  file->release(first, one.size());
  back.resize(two.size());
  file->read(second, two.size(), back.data(), false);
  CHECK(back == two);
  CHECK_THROWS(kPlacement, File::scratch("/nowhere/at/all"));
}

void changed_files_are_noticed() {
  const auto data = pattern(50'000, 6);
  std::vector<std::byte> into(50'000);
  const std::string path = write_file("changing.bin", data);
  auto file = File::open(path);
  CHECK(File::open(path) == file);
  std::filesystem::resize_file(path, 20'000);
  CHECK(File::open(path) != file);
  CHECK_THROWS(kFetch, file->read(0, 50'000, into.data(), false));
  write_file(path, data);
  file = File::open(path);
  const auto time = std::filesystem::last_write_time(path);
  std::filesystem::last_write_time(
      path, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  CHECK_THROWS(kFetch, file->read(0, 10, into.data(), false));
  // Once it has its time back, it is the same file, and not one beside it.
  const auto meanwhile = File::open(path);
  CHECK(meanwhile != file);
  std::filesystem::last_write_time(path, time);
  CHECK(File::open(path) == file);
  CHECK_THROWS(kFormat, File::open("no such file"));
  // What is no ordinary file is refused at once. A pipe would wait for a writer, a device never
  // end.
  CHECK(::mkfifo("pipe", 0600) == 0);
  CHECK_THROWS(kFormat, File::open("pipe"));
  CHECK_THROWS(kFormat, File::open("/dev/zero"));
  CHECK_THROWS(kFormat, File::open("."));
  // A file that is replaced (another inode) does not matter: ours is open.
  file = File::open(path);
  std::filesystem::rename(path, "old.bin");
  write_file(path, pattern(50'000, 7));
  CHECK(File::open(path) != file);
  file->read(0, 50'000, into.data(), false);
  CHECK(into == data);
}

void checksums() {
  // The check value that every description of CRC-32C gives.
  const std::string digits = "123456789";
  CHECK(checksum(reinterpret_cast<const std::byte*>(digits.data()), digits.size()) == 0xe3069283);
  CHECK(checksum(nullptr, 0) == 0);
  const auto data = pattern(3 * kSummed + 5, 31);
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{7}, uint64_t{8}, uint64_t{4099}}) {
    CHECK(checksum_by_tables(data.data() + 1, bytes) == checksum(data.data() + 1, bytes));
  }
  const std::vector<uint64_t> cuts = {kSummed + 9, 7, 0, kSummed, 9 * kSummed};
  const std::vector<uint64_t> ends = {7,           kSummed,     kSummed + 9,
                                      2 * kSummed, 3 * kSummed, 3 * kSummed + 5};
  CHECK(block_ends(0, data.size(), cuts) == ends);
  CHECK(block_ends(kSummed, 2 * kSummed, cuts) == std::vector(ends.begin() + 2, ends.begin() + 4));
  CHECK(block_ends(5, 5, cuts).empty());
  const auto sums = block_sums(data.data(), 0, ends, 3);
  CHECK(sums.size() == 6);
  CHECK(sums[2] == checksum(data.data() + kSummed, 9));
  CHECK(sums[5] == checksum(data.data() + 3 * kSummed, 5));
}

// Changes one byte. The file's time stays.
void rot(const std::string& path, uint64_t at) {
  const auto time = std::filesystem::last_write_time(path);
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekg(static_cast<std::streamoff>(at));
  const char byte = static_cast<char>(file.get() ^ 1);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(byte);
  file.close();
  std::filesystem::last_write_time(path, time);
}

// A changed byte is noticed by every read of its block, and by no other.
void changed_bytes_are_noticed() {
  std::mt19937_64 random(32);
  for (const uint64_t size : {uint64_t{1}, kSummed - 1, kSummed, kSummed + 1, 5 * kSummed + 777}) {
    const auto data = pattern(size, size);
    const std::string path = write_file("rotting.bin", data);
    const auto file = File::open(path);
    std::vector<uint64_t> cuts(random() % 6);
    for (uint64_t& cut : cuts) cut = random() % size;
    Checksums sums{block_ends(0, size, cuts), {}};
    CHECK_THROWS(kFormat, file->verify_with(sums));
    CHECK_THROWS(kFormat, file->verify_with({{99}, {1}}));
    sums.sums = block_sums(data.data(), 0, sums.ends, 2);
    file->verify_with(sums);
    std::vector<std::byte> memory(size + 4 * kPage);
    for (int i = 0; i < 80; ++i) {
      uint64_t offset = random() % size, end = offset + random() % (size - offset) + 1;
      if (i % 4 == 0) {  // whole blocks, as most reads are
        offset = sums.begin_of(sums.block_at(offset));
        end = sums.ends[sums.block_at(end - 1)];
      }
      const uint64_t bytes = end - offset;
      const bool slack = i % 2 == 0;
      std::byte* into = memory.data() + kPage + random() % 64;
      if (slack) into += (offset - reinterpret_cast<uintptr_t>(into)) % kPage;
      into[-1] = into[bytes] = std::byte{77};
      file->read(offset, bytes, into, slack);
      CHECK(std::memcmp(into, data.data() + offset, bytes) == 0);
      CHECK(slack || (into[-1] == std::byte{77} && into[bytes] == std::byte{77}));
      CHECK(std::memcmp(file->map(offset, bytes).get(), data.data() + offset, bytes) == 0);
      const uint64_t at = random() % size;
      rot(path, at);
      if (i % 3 == 0) forget_cached_pages(path);
      const size_t rotten = sums.block_at(at);
      if (sums.block_at(offset) <= rotten && rotten <= sums.block_at(end - 1)) {
        CHECK_THROWS(kFetch, file->read(offset, bytes, into, slack));
        CHECK_THROWS(kFetch, file->map(offset, bytes));
      } else {
        file->read(offset, bytes, into, slack);
        CHECK(std::memcmp(into, data.data() + offset, bytes) == 0);
      }
      rot(path, at);
    }
    file->read(0, 0, memory.data(), false);
    file->map(0, 0);
  }
}

// Memory that a disk cannot write to by itself, as some of a driver's: unbuffered reads into it
// fail with EFAULT. Secret memory is of that kind; where the kernel has none, nothing is shown.
void memory_that_takes_no_unbuffered_reads() {
  constexpr uint64_t kBytes = 64 * kPage;
  const int secret = static_cast<int>(::syscall(SYS_memfd_secret, 0));
  if (secret < 0 || ::ftruncate(secret, kBytes) != 0) return;
  void* memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, secret, 0);
  ::close(secret);
  if (memory == MAP_FAILED) return;
  const auto data = pattern(kBytes, 21);
  forget_cached_pages(write_file("secret.bin", data));
  File::open("secret.bin")->read(0, kBytes, static_cast<std::byte*>(memory), true);
  CHECK(std::memcmp(memory, data.data(), kBytes) == 0);
  ::munmap(memory, kBytes);
}

// Into memory that is in the file's phase and not, with neighbours that must
// not change where they are not the reader's.
void bulk_reads() {
  const std::string path = "bulk.bin";
  const auto data = pattern(21'000'000, 11);
  forget_cached_pages(write_file(path, data));
  const auto file = File::open(path);
  std::vector<std::byte> memory(data.size() + 4 * kPage);
  std::mt19937_64 random(12);
  for (int i = 0; i < 24; ++i) {
    const uint64_t offset = random() % 9'000'000 / 8 * 8;
    const uint64_t bytes = i == 0 ? data.size() - offset : random() % 12'000'000;
    const bool slack = i % 3 == 0;
    std::byte* into = memory.data() + kPage;
    if (i % 3 < 2) {
      const uint64_t phase = offset % kPage;
      into += (phase + kPage - reinterpret_cast<uintptr_t>(into) % kPage) % kPage;
    }
    into[-1] = into[bytes] = std::byte{77};
    bulk_read(*file, offset, bytes, into, 3, slack);
    CHECK(std::memcmp(into, data.data() + offset, bytes) == 0);
    CHECK(slack || (into[-1] == std::byte{77} && into[bytes] == std::byte{77}));
  }
  CHECK_THROWS(kFetch, bulk_read(*file, 1, data.size(), memory.data(), 3));
}

void copies() {
  std::mt19937_64 random(8);
  const auto data = pattern(200'000, 9);
  std::vector<std::byte> into(210'000);
  for (int i = 0; i < 500; ++i) {
    const uint64_t begin = random() % 1000, to = random() % 1000, bytes = random() % 190'000;
    std::fill(into.begin(), into.end(), std::byte{0});
    stream_copy(into.data() + to, data.data() + begin, bytes);
    CHECK(std::memcmp(into.data() + to, data.data() + begin, bytes) == 0);
    CHECK(into[to + bytes] == std::byte{0});
    CHECK(to == 0 || into[to - 1] == std::byte{0});
  }
}

}  // namespace

int main() {
  reads_of_any_alignment(true);
  reads_of_any_alignment(false);
  scratch_file();
  memory_that_takes_no_unbuffered_reads();
  changed_files_are_noticed();
  checksums();
  changed_bytes_are_noticed();
  bulk_reads();
  copies();
}
