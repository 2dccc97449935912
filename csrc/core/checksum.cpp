// SPDX-License-Identifier: Apache-2.0
#include "core/checksum.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/alignment.h"
#include "core/parts.h"
#include "core/processor.h"

namespace distorch {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // bit-reversed

// kTables[k][b]: what byte b does to the sum when k more bytes follow it.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ ((sum & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = sum;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}();

uint64_t load64(const std::byte* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

constexpr uint64_t kWordBytes = 8, kStrideBytes = 4 * kWordBytes;

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("sse4.2"))) uint32_t by_instruction(const std::byte* data, uint64_t bytes) {
  uint64_t sum = ~0u;
  if (bytes >= kStrideBytes) {
    uint64_t one = sum, two = sum, three = sum, four = sum;  // in an array they would be in memory
    for (; bytes >= kStrideBytes; data += kStrideBytes, bytes -= kStrideBytes) {
      one = __builtin_ia32_crc32di(one, load64(data));
      two = __builtin_ia32_crc32di(two, load64(data + kWordBytes));
      three = __builtin_ia32_crc32di(three, load64(data + 2 * kWordBytes));
      four = __builtin_ia32_crc32di(four, load64(data + 3 * kWordBytes));
    }
    for (const uint64_t lane : {one, two, three, four}) sum = __builtin_ia32_crc32di(sum, lane);
  }
  auto tail = static_cast<uint32_t>(sum);
  for (; bytes > 0; ++data, --bytes) {
    tail = __builtin_ia32_crc32qi(tail, static_cast<unsigned char>(*data));
  }
  return ~tail;
}
#endif

uint32_t with_word(uint32_t sum, uint64_t word) {
  word ^= sum;
  sum = 0;
  for (size_t k = 0; k < 8; ++k) sum ^= kTables[7 - k][word >> 8 * k & 0xff];
  return sum;
}

}  // namespace

uint32_t checksum_by_tables(const std::byte* data, uint64_t bytes) {
  uint32_t sum = ~0u;
  if (bytes >= kStrideBytes) {
    uint32_t lanes[4] = {sum, sum, sum, sum};
    for (; bytes >= kStrideBytes; data += kStrideBytes, bytes -= kStrideBytes) {
      for (int i = 0; i < 4; ++i) lanes[i] = with_word(lanes[i], load64(data + i * kWordBytes));
    }
    for (const uint32_t lane : lanes) sum = with_word(sum, lane);
  }
  for (; bytes > 0; ++data, --bytes) {
    sum = (sum >> 8) ^ kTables[0][(sum ^ static_cast<uint32_t>(*data)) & 0xff];
  }
  return ~sum;
}

uint32_t checksum(const std::byte* data, uint64_t bytes) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has_instruction = has_sse42();
  if (has_instruction) return by_instruction(data, bytes);
#endif
  return checksum_by_tables(data, bytes);
}

std::vector<uint64_t> block_ends(uint64_t begin, uint64_t end, const std::vector<uint64_t>& cuts) {
  std::vector<uint64_t> ends;
  for (uint64_t at = round_down(begin, kSummed) + kSummed; at < end; at += kSummed) {
    ends.push_back(at);
  }
  for (const uint64_t cut : cuts) {
    if (begin < cut && cut < end) ends.push_back(cut);
  }
  if (begin < end) ends.push_back(end);
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  return ends;
}

std::vector<uint32_t> block_sums(const std::byte* data, uint64_t begin,
                                 const std::vector<uint64_t>& ends, size_t threads) {
  std::vector<uint32_t> sums(ends.size());
  constexpr int64_t kPerPart = 64;  // blocks: up to 4 MiB
  for_ranges(static_cast<int64_t>(ends.size()), kPerPart, threads,
             [&](int64_t first, int64_t last) {
               for (int64_t block = first; block < last; ++block) {
                 const uint64_t from = block == 0 ? begin : ends[block - 1];
                 sums[block] = checksum(data + (from - begin), ends[block] - from);
               }
             });
  return sums;
}

size_t Checksums::block_at(uint64_t offset) const {
  return static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), offset) - ends.begin());
}

}  // namespace distorch
