// SPDX-License-Identifier: Apache-2.0
// How each GGUF tensor type stores its numbers: one description, from which
// the kernels for every processor are made.
//
// Note [A block's description]
// A block is `kElements` numbers in `kBytes` bytes. They come in groups of
// `kGroup` neighbours with one scale. A description says
//   Group open(block, g)       what the g-th group has in common
//   float number(group, i)     its i-th number
//   bool ordinary(block)       its numbers are 0 or of a magnitude from 2^-100
//                              to 2^100, by its scales
// and nothing else: no loops, no branches on data, so that compilers make
// vectors of loops over i, and a CUDA thread may take any piece of a group.
//
// The bits of a result are those of gguf-py's `quants.dequantize`. It rounds
// after every operation, in its order, in float32: products of scales first,
// and no fused multiply-add anywhere. (Where a type adds an offset, today's
// products are exact, 22 bits at most; the rule is for types to come.)
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace distorch::blocks {

DISTORCH_HD int32_t bits_of(uint32_t word, int shift, uint32_t mask) {
  return static_cast<int32_t>(word >> shift & mask);
}

// The same for each of several numbers.
template <class Int>
DISTORCH_HD Int part(Int numbers, int shift, int mask) {
  return numbers >> shift & mask;
}

template <class Int>
DISTORCH_HD auto product(float scale, Int digit) {
  return scale * to_float(digit);
}

template <class Int>
DISTORCH_HD auto product_and(float scale, Int digit, float offset) {
  return times_plus(scale, to_float(digit), offset);
}

// Whether a float16 is finite. If so, every number made with it is ordinary.
DISTORCH_HD bool finite_half(const uint8_t* from) { return (from[1] & 0x7c) != 0x7c; }

// --- 32 numbers: the low half of byte i is number i, the high half number 16 + i ---

struct Q4_0 {
  static constexpr int kElements = 32, kBytes = 18, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* bytes;
    int shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {half_at(block), block + 2, 4 * g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product(group.d, part(byte_at(group.bytes, i), group.shift, 15) - 8);
  }
};

struct Q4_1 {
  static constexpr int kElements = 32, kBytes = 20, kGroup = 16;
  struct Group {
    float d, least;
    const uint8_t* bytes;
    int shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    return finite_half(block) && finite_half(block + 2);
  }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {half_at(block), half_at(block + 2), block + 4, 4 * g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product_and(group.d, part(byte_at(group.bytes, i), group.shift, 15), group.least);
  }
};

// The fifth bits of all numbers are one word, number 0's lowest.
struct Q5_0 {
  static constexpr int kElements = 32, kBytes = 22, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* bytes;
    int shift;
    uint32_t fifth;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {half_at(block), block + 6, 4 * g, load32(block + 2) >> 16 * g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto low = part(byte_at(group.bytes, i), group.shift, 15);
    return product(group.d, (low | packed_at<1>(group.fifth, place_of(i)) << 4) - 16);
  }
};

struct Q5_1 {
  static constexpr int kElements = 32, kBytes = 24, kGroup = 16;
  struct Group {
    float d, least;
    const uint8_t* bytes;
    int shift;
    uint32_t fifth;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    return finite_half(block) && finite_half(block + 2);
  }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {half_at(block), half_at(block + 2), block + 8, 4 * g, load32(block + 4) >> 16 * g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto low = part(byte_at(group.bytes, i), group.shift, 15);
    return product_and(group.d, low | packed_at<1>(group.fifth, place_of(i)) << 4, group.least);
  }
};

struct Q8_0 {
  static constexpr int kElements = 32, kBytes = 34, kGroup = 32;
  struct Group {
    float d;
    const uint8_t* bytes;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int) { return {half_at(block), block + 2}; }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product(group.d, signed_byte_at(group.bytes, i));
  }
};

// --- 256 numbers, scales of scales ---

// 2 bits: byte 32 h + j holds numbers 128 h + 32 s + j, s = 0..3 from the
// lowest bits up. For the g-th 16 numbers: their first byte, and their bits.
DISTORCH_HD int two_bit_byte(int g) { return 32 * (g / 8) + 16 * (g % 2); }
DISTORCH_HD int two_bit_shift(int g) { return 2 * (g % 8 / 2); }

struct Q2_K {
  static constexpr int kElements = 256, kBytes = 84, kGroup = 16;
  struct Group {
    float d, minus;
    const uint8_t* bytes;
    int shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    return finite_half(block + 80) && finite_half(block + 82);
  }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const float d = product(half_at(block + 80), block[g] & 15);
    const float minus = product(half_at(block + 82), block[g] >> 4);
    return {d, -minus, block + 16 + two_bit_byte(g), two_bit_shift(g)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product_and(group.d, part(byte_at(group.bytes, i), group.shift, 3), group.minus);
  }
};

struct Q3_K {
  static constexpr int kElements = 256, kBytes = 110, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* bytes;
    int shift;
    const uint8_t* mask;
    int mask_shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block + 108); }
  // 6 bits of scale: the low 4 in bytes 96..103, group g + 8 above g; the high 2 in 104..107.
  // Bit b of byte j of the mask belongs to number 32 b + j.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const int low = block[96 + g % 8] >> 4 * (g / 8) & 15;
    const int high = block[104 + g % 4] >> 2 * (g / 4) & 3;
    return {product(half_at(block + 108), (low | high << 4) - 32), block + 32 + two_bit_byte(g),
            two_bit_shift(g), block + 16 * (g % 2), g / 2};
  }
  // 4 less where the mask is not set.
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto low = part(byte_at(group.bytes, i), group.shift, 3);
    return product(group.d, low + 4 * part(byte_at(group.mask, i), group.mask_shift, 1) - 4);
  }
};

// 8 scales and 8 offsets of 6 bits in 12 bytes: the first four of each in the
// low bits of bytes 0..3 and 4..7; the rest in halves of bytes 8..11, with
// their two high bits above those of the first four.
DISTORCH_HD int six_bit_scale(const uint8_t* from, int g) {
  const int late = (from[g % 4 + 8] & 15) | (from[g % 4] >> 2 & 0x30);
  return g < 4 ? from[g] & 63 : late;
}

DISTORCH_HD int six_bit_offset(const uint8_t* from, int g) {
  const int late = from[g % 4 + 8] >> 4 | (from[g % 4 + 4] >> 2 & 0x30);
  return g < 4 ? from[g + 4] & 63 : late;
}

struct Q4_K {
  static constexpr int kElements = 256, kBytes = 144, kGroup = 32;
  struct Group {
    float d, minus;
    const uint8_t* bytes;
    int shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    return finite_half(block) && finite_half(block + 2);
  }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {product(half_at(block), six_bit_scale(block + 4, g)),
            -product(half_at(block + 2), six_bit_offset(block + 4, g)), block + 16 + 32 * (g / 2),
            4 * (g % 2)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product_and(group.d, part(byte_at(group.bytes, i), group.shift, 15), group.minus);
  }
};

struct Q5_K {
  static constexpr int kElements = 256, kBytes = 176, kGroup = 32;
  struct Group {
    Q4_K::Group low;
    const uint8_t* fifth;
    int fifth_shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return Q4_K::ordinary(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {Q4_K::open(block, g), block + 16, g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto low = part(byte_at(group.low.bytes + 32, i), group.low.shift, 15);
    const auto fifth = part(byte_at(group.fifth, i), group.fifth_shift, 1);
    return product_and(group.low.d, low | fifth << 4, group.low.minus);
  }
};

struct Q6_K {
  static constexpr int kElements = 256, kBytes = 210, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* low;
    int low_shift;
    const uint8_t* high;
    int high_shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block + 208); }
  // Low 4 bits: byte 64 h + j holds numbers 128 h + j and 128 h + 64 + j.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {product(half_at(block + 208), static_cast<int8_t>(block[192 + g])),
            block + 64 * (g / 8) + 16 * (g % 4), 4 * (g % 8 / 4), block + 128 + two_bit_byte(g),
            two_bit_shift(g)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto low = part(byte_at(group.low, i), group.low_shift, 15);
    return product(group.d, (low | part(byte_at(group.high, i), group.high_shift, 3) << 4) - 32);
  }
};

// --- ternary ---

struct TQ2_0 {
  static constexpr int kElements = 256, kBytes = 66, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* bytes;
    int shift;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block + 64); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    return {half_at(block + 64), block + two_bit_byte(g), two_bit_shift(g)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product(group.d, part(byte_at(group.bytes, i), group.shift, 3) - 1);
  }
};

// Five digits to a byte, as a fraction of 256: the leading digit of
// byte * 3^n, modulo 256, is digit n. Bytes 0..31 hold numbers 0..159 (byte j:
// 32 n + j), bytes 32..47 numbers 160..239 (16 n + j), and bytes 48..51 four
// digits each: 240..255 (4 n + j).
struct TQ1_0 {
  static constexpr int kElements = 256, kBytes = 54, kGroup = 16;
  struct Group {
    float d;
    const uint8_t* bytes;
    int power;
    bool last;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block + 52); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const bool first = g < 10;
    return {half_at(block + 52), block + (first ? 16 * (g % 2) : 32),
            power_of_3(first ? g / 2 : g - 10), g == 15};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    if (group.last) {
      const auto place = place_of(i);
      const auto power = packed_at<8>(0x1b090301u, place >> 2);
      return product(group.d, leading(packed_at<8>(load32(group.bytes + 16), place & 3) * power));
    }
    return product(group.d, leading(byte_at(group.bytes, i) * group.power));
  }
  template <class Int>
  static DISTORCH_HD Int leading(Int fraction) {
    return ((fraction & 255) * 3 >> 8) - 1;
  }
  static DISTORCH_HD int power_of_3(int n) {
    return (n & 1 ? 3 : 1) * (n & 2 ? 9 : 1) * (n & 4 ? 81 : 1);
  }
};

// --- 4 bits that choose one of 16 numbers ---

// The numbers are bytes of four words.
template <uint32_t kFirst, uint32_t kSecond, uint32_t kThird, uint32_t kFourth, class Int>
DISTORCH_HD Int choose(Int index) {
  const Int low = (index & 4) != 0 ? Int{} + static_cast<int32_t>(kSecond)
                                   : Int{} + static_cast<int32_t>(kFirst);
  const Int high = (index & 4) != 0 ? Int{} + static_cast<int32_t>(kFourth)
                                    : Int{} + static_cast<int32_t>(kThird);
  const Int word = (index & 8) != 0 ? high : low;
  return word << (24 - 8 * (index & 3)) >> 24;
}

// -127 -104 -83 -65   -49 -35 -22 -10   1 13 25 38   53 69 89 113
template <class Int>
DISTORCH_HD Int uneven(Int index) {
  return choose<0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u>(index);
}

// Twice the numbers of E2M1: 0 1 2 3   4 6 8 12   and their negatives (0 for -0).
template <class Int>
DISTORCH_HD Int doubled_e2m1(Int index) {
  return choose<0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu>(index);
}

struct IQ4_NL {
  static constexpr int kElements = 32, kBytes = 18, kGroup = 16;
  using Group = Q4_0::Group;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  static DISTORCH_HD Group open(const uint8_t* block, int g) { return Q4_0::open(block, g); }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product(group.d, uneven(part(byte_at(group.bytes, i), group.shift, 15)));
  }
};

struct IQ4_XS {
  static constexpr int kElements = 256, kBytes = 136, kGroup = 16;
  using Group = Q4_0::Group;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return finite_half(block); }
  // One scale of 6 bits to 32 numbers.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const int low = block[4 + g / 4] >> 4 * (g / 2 % 2) & 15;
    const int high = bits_of(load16(block + 2), 2 * (g / 2), 3);
    return {product(half_at(block), (low | high << 4) - 32), block + 8 + 16 * (g / 2), 4 * (g % 2)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return IQ4_NL::number(group, i);
  }
};

struct MXFP4 {
  static constexpr int kElements = 32, kBytes = 17, kGroup = 16;
  using Group = Q4_0::Group;
  static DISTORCH_HD bool ordinary(const uint8_t* block) { return block[0] > 28 && block[0] < 224; }
  // 2^(byte - 128): half of E8M0, since the digits are doubled.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t e = block[0];
    return {as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23), block + 1, 4 * g};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return product(group.d, doubled_e2m1(part(byte_at(group.bytes, i), group.shift, 15)));
  }
};

// Four parts of 16 numbers: a scale each in bytes 0..3, then 8 bytes each.
struct NVFP4 {
  static constexpr int kElements = 64, kBytes = 36, kGroup = 8;
  struct Group {
    float d;
    uint32_t first, second;
  };
  static DISTORCH_HD bool ordinary(const uint8_t*) { return true; }
  // The scale is half of E4M3 without a sign; 0 for its NaN.
  static DISTORCH_HD Group open(const uint8_t* block, int g) {
    const uint32_t bits = block[g / 2], exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float subnormal = static_cast<float>(mantissa) * 0x1p-10f;
    const float normal = as_float((exponent + 119) << 23 | mantissa << 20);
    const float d = bits == 0x7f ? 0.0f : exponent == 0 ? subnormal : normal;
    const uint8_t* bytes = block + 4 + 8 * (g / 2);
    return {d, load32(bytes) >> 4 * (g % 2), load32(bytes + 4) >> 4 * (g % 2)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto place = place_of(i);
    const auto first = packed_at<8>(group.first, place & 3);
    const auto second = packed_at<8>(group.second, place & 3);
    return product(group.d, doubled_e2m1((place < 4 ? first : second) & 15));
  }
};

}  // namespace distorch::blocks
