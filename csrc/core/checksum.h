// SPDX-License-Identifier: Apache-2.0
// Checksums of a file's blocks, which tell when bytes are not those they were.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distorch {

// Of less than 32 bytes: their CRC-32C (Castagnoli), which iSCSI, ext4 and btrfs use. Of more: four
// CRC-32C side by side, of which each takes every fourth word of 8 bytes. They are then put through
// another one, together with the bytes behind the last whole word. (The processor needs three
// cycles for a word, but begins a new one in each cycle.)
uint32_t checksum(const std::byte* data, uint64_t bytes);
// The same without the processor's instruction for it.
uint32_t checksum_by_tables(const std::byte* data, uint64_t bytes);

// No block has more bytes than this.
inline constexpr uint64_t kSummed = 64 << 10;

// Where the blocks of the bytes [begin, end) of a file end, in order: at multiples of kSummed, and
// at `cuts`, where weights begin and end. So no block has bytes of two weights. If one is damaged,
// the other weights can still be used.
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
