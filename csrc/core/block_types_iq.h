// SPDX-License-Identifier: Apache-2.0
// The IQ types of GGUF files with codebooks; see Note [A block's description].
//
// All of them have 256 numbers in 32 groups of 8: an index into a codebook
// gives the magnitudes of a group (IQ3: of half of one), a byte its signs.
#pragma once

#include <cstdint>

#include "core/block_grids.h"
#include "core/block_types.h"
#include "core/portable.h"

namespace distorch::blocks {

struct GridGroup {
  float d;
  uint32_t grid;   // digits of the codebook, the first number's lowest
  uint32_t signs;  // bit i negates number i
};

template <class Int, class I>
DISTORCH_HD auto signed_product(const GridGroup& group, Int magnitude, I i) {
  const Int negative = -packed_at<1>(group.signs, place_of(i));
  return product(group.d, (magnitude ^ negative) - negative);
}

// 7 stored signs; the eighth makes the number of negatives even.
DISTORCH_HD uint32_t even_signs(uint32_t seven) {
  uint32_t parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1) << 7;
}

// Two scales of 4 bits to a byte, the lower first.
DISTORCH_HD uint32_t half_byte(const uint8_t* from, int index) {
  return from[index / 2] >> 4 * (index % 2) & 15;
}

// d * (0.5 + digit) * step, rounded as often as written.
DISTORCH_HD float iq_scale(float d, uint32_t digit, float step) {
  return d * (0.5f + static_cast<float>(digit)) * step;
}

// --- IQ2: digits 0 1 2 are 8 25 43 ---

struct IQ2 {
  static constexpr int kElements = 256, kGroup = 8;
  using Group = GridGroup;
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto digit = packed_at<2>(group.grid, place_of(i));
    return signed_product(group, 8 + 17 * digit + (digit >> 1), i);
  }
};

struct IQ2_XXS : IQ2 {
  static constexpr int kBytes = 66;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // 8 bytes for four groups: 4 indices, then a word of 4 x 7 signs and 4 bits of scale.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint8_t* four = block + 2 + 8 * (g / 4);
    const uint32_t word = load32(four + 4);
    return {iq_scale(half_at(block), word >> 28, 0.25f), iq2_xxs_grid(four[g % 4]),
            even_signs(word >> 7 * (g % 4) & 127)};
  }
};

struct IQ2_XS : IQ2 {
  static constexpr int kBytes = 74;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // 9 bits of index and 7 signs.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t word = load16(block + 2 + 2 * g);
    return {iq_scale(half_at(block), half_byte(block + 66, g / 2), 0.25f), iq2_xs_grid(word & 511),
            even_signs(word >> 9)};
  }
};

struct IQ2_S : IQ2 {
  static constexpr int kBytes = 82;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // 8 bits of index in bytes 2..33, the signs in 34..65, 2 more bits of index in 66..73.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t high = block[66 + g / 4] >> 2 * (g % 4) & 3;
    return {iq_scale(half_at(block), half_byte(block + 74, g / 2), 0.25f),
            iq2_s_grid(block[2 + g] | high << 8), block[34 + g]};
  }
};

// --- IQ3: two entries of four digits ---

struct IQ3_XXS {
  static constexpr int kElements = 256, kBytes = 98, kGroup = 8;
  using Group = GridGroup;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t word = load32(block + 66 + 4 * (g / 4));
    return {iq_scale(half_at(block), word >> 28, 0.5f),
            iq3_xxs_grid(block[2 + 2 * g]) | iq3_xxs_grid(block[3 + 2 * g]) << 12,
            even_signs(word >> 7 * (g % 4) & 127)};
  }
  // Digits 0..7 are 4 12 20 28 36 44 52 62.
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto digit = packed_at<3>(group.grid, place_of(i));
    return signed_product(group, 4 + 8 * digit + ((digit + 1) >> 3 << 1), i);
  }
};

struct IQ3_S {
  static constexpr int kElements = 256, kBytes = 110, kGroup = 8;
  using Group = GridGroup;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // 8 bits of index in bytes 2..65, the ninth in 66..73, the signs in 74..105.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t ninth = block[66 + g / 4] >> 2 * (g % 4);
    const uint32_t first = iq3_s_grid(block[2 + 2 * g] | (ninth & 1) << 8);
    const uint32_t second = iq3_s_grid(block[3 + 2 * g] | (ninth >> 1 & 1) << 8);
    const auto digit = static_cast<int32_t>(half_byte(block + 106, g / 4));
    return {product(half_at(block), 1 + 2 * digit), first | second << 12, block[74 + g]};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return signed_product(group, 1 + 2 * packed_at<3>(group.grid, place_of(i)), i);
  }
};

// --- IQ1: scale * (digit - 1 +- 1/8) ---

struct IQ1 {
  static constexpr int kElements = 256, kGroup = 8;
  struct Group {
    float d;
    uint32_t grid;
    int32_t least;  // digit 0, in eighths
  };
  static DISTORCH_HD int32_t least(bool down) { return down ? -9 : -7; }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return group.d * (to_float(8 * packed_at<2>(group.grid, place_of(i)) + group.least) * 0.125f);
  }
};

struct IQ1_S : IQ1 {
  static constexpr int kBytes = 50;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // A word for four groups: 4 x 3 bits of index, 3 bits of scale, the sign of the eighth.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t word = load16(block + 34 + 2 * (g / 4));
    const uint32_t index = block[2 + g] | (word >> 3 * (g % 4) & 7) << 8;
    return {product(half_at(block), 2 * bits_of(word, 12, 7) + 1), iq1_grid(index),
            least(word >> 15 != 0)};
  }
};

struct IQ1_M : IQ1 {
  static constexpr int kBytes = 56;
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    return (scale(block) & 0x7c00) != 0x7c00;
  }
  static DISTORCH_HD uint32_t scale(const uint8_t* block) {
    const uint8_t* words = block + 48;
    return words[1] >> 4 | (words[3] & 0xf0u) | static_cast<uint32_t>(words[5] >> 4) << 8 |
           (words[7] & 0xf0u) << 8;
  }
  // 8 bits of index in bytes 0..31; 3 more and the sign of the eighth in halves of 32..47.
  // Four words at 48: 4 x 3 bits of scale each, and in their top bits the block's float16.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint8_t* words = block + 48;
    const int32_t digit = bits_of(load16(words + 2 * (g / 8)), 3 * (g / 2 % 4), 7);
    const uint32_t high = half_byte(block + 32, g);
    return {product(half_of(scale(block)), 2 * digit + 1), iq1_grid(block[g] | (high & 7) << 8),
            least((high & 8) != 0)};
  }
};

}  // namespace distorch::blocks
