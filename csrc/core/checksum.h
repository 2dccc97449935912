// SPDX-License-Identifier: Apache-2.0
// Checksums of a file's blocks, which tell when bytes are not those they were.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distorch {

// Four CRC-32C (Castagnoli, as iSCSI, ext4 and btrfs use it) side by side, each of every fourth
// word of 8 bytes, and then one of them and of the bytes that are left. One alone would wait three
// cycles for each word. Up to 31 bytes it is their CRC-32C.
uint32_t checksum(const std::byte* data, uint64_t bytes);
// The same without the processor's instruction for it.
uint32_t checksum_by_tables(const std::byte* data, uint64_t bytes);

// Where the blocks of a file end: at every multiple of kSummed, and at `cuts`, where weights begin
// and end. So no block has bytes of two weights, and one that is damaged leaves the others usable.
// Of the bytes [begin, end); in order.
inline constexpr uint64_t kSummed = 64 << 10;
std::vector<uint64_t> block_ends(uint64_t begin, uint64_t end, const std::vector<uint64_t>& cuts);

// One sum of each block of `data`, whose first byte is at `begin` of the file. By several threads.
std::vector<uint32_t> block_sums(const std::byte* data, uint64_t begin,
                                 const std::vector<uint64_t>& ends, size_t threads);

// The blocks of a file, and what each of them has to be.
struct Checksums {
  std::vector<uint64_t> ends;
  std::vector<uint32_t> sums;

  // The block that has the byte at `offset`. REQUIRES: it is in the file.
  size_t block_at(uint64_t offset) const;
  uint64_t begin_of(size_t block) const { return block == 0 ? 0 : ends[block - 1]; }
};

}  // namespace distorch
