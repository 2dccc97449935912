// SPDX-License-Identifier: Apache-2.0
// Blocks that are made when a file is read: ComfyUI's narrow formats keep numbers
// and their scales in separate tensors, and here each block has its scale before
// its numbers (distorch/formats/packing.py). So a row can be decoded from its own bytes.
//
// These are descriptions as in block_types.h; see Note [A block's description].
// Some need numbers that all blocks of a weight share: `table`. docs/files.md says
// which bits of comfy-kitchen's they give.
#pragma once

#include <cstdint>

#include "core/block_types.h"
#include "core/portable.h"

namespace distorch::blocks {

// E4M3 without infinities, exact.
template <class Int>
DISTORCH_HD auto e4m3(Int byte) {
  const Int magnitude = byte & 0x7f;
  const auto normal = float_of((magnitude << 20) + (120 << 23));
  const auto small = to_float(magnitude) * 0x1p-9f;
  const auto nan = float_of(Int{} + 0x7fc00000);
  const auto number = magnitude < 8 ? small : normal;
  return flipped(magnitude == 0x7f ? nan : number, (byte & 0x80) << 24);
}

// 16 halves of bytes, the low half of each byte first.
struct Halves {
  uint32_t first, second;
};
DISTORCH_HD Halves halves_at(const uint8_t* from) { return {load32(from), load32(from + 4)}; }
template <class Int>
DISTORCH_HD Int half_at_place(const Halves& halves, Int place) {
  const Int in_first = packed_at<4>(halves.first, place & 7);
  const Int in_second = packed_at<4>(halves.second, place & 7);
  return place < 8 ? in_first : in_second;
}

// To the nearest of the integers that int8 products take; a tie goes to the even one.
template <class Floats>
DISTORCH_HD Floats to_int8_grid(Floats number) {
  const Floats most = Floats{} + 127.0f;
  const Floats low = number > most ? most : number;
  const Floats clamped = low < -most ? -most : low;
  return (clamped + 0x1.8p23f) - 0x1.8p23f;  // no digit behind the point is left in the sum
}

// nvfp4. 0: the scale (E4M3), times the table's one number. 1..8: E2M1, the high half first.
struct FP4x16 {
  static constexpr int kElements = 16, kBytes = 9, kGroup = 16, kTable = 1;
  struct Group {
    float d;
    Halves halves;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block, const float* table) {
    const float d = open(block, 0, table).d, magnitude = d < 0 ? -d : d;
    return magnitude == 0 || (magnitude >= 0x1p-90f && magnitude <= 0x1p90f);
  }
  static DISTORCH_HD Group open(const uint8_t* block, int, const float* table) {
    return {table[0] * e4m3(static_cast<int32_t>(block[0])), halves_at(block + 1)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto digit = half_at_place(group.halves, place_of(i) ^ 1);
    const auto magnitude = to_float(doubled_e2m1(digit & 7)) * 0.5f;
    return flipped(group.d * magnitude, (digit & 8) << 28);
  }
};

// mxfp8. 0: the scale (E8M0). 1..32: E4M3.
struct FP8x32 {
  static constexpr int kElements = 32, kBytes = 33, kGroup = 32;
  struct Group {
    float d;
    const uint8_t* bytes;
  };
  static DISTORCH_HD bool ordinary(const uint8_t* block) {
    uint32_t some_nan = 0;
    for (int i = 1; i < kBytes; i += 4) {
      const uint32_t word = load32(block + i) & 0x7f7f7f7fu;
      some_nan |= (word + 0x01010101u) & 0x80808080u;  // 0x7f is NaN
    }
    return block[0] >= 40 && block[0] < 215 && some_nan == 0;
  }
  // 0 is zero and 255 infinity, as comfy-kitchen has it.
  static DISTORCH_HD Group open(const uint8_t* block, int) {
    return {as_float(static_cast<uint32_t>(block[0]) << 23), block + 1};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return group.d * e4m3(byte_at(group.bytes, i));
  }
};

// asym_w4a8_int8. 0: the scale (E4M3). 1..8: which of the table's 16 levels, the low half first.
// Level times scale gives an integer of 8 bits. Integers times the row's scale are the weight.
struct W4x16 {
  static constexpr int kElements = 16, kBytes = 9, kGroup = 16, kTable = 16;
  struct Group {
    float d;
    Halves halves;
    const float* levels;
  };
  static DISTORCH_HD bool ordinary(const uint8_t*, const float*) { return true; }
  static DISTORCH_HD Group open(const uint8_t* block, int, const float* table) {
    return {finite_e4m3(block[0]), halves_at(block + 1), table};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto level = entry_of(group.levels, half_at_place(group.halves, place_of(i)));
    return to_int8_grid(level * group.d);
  }
  // A scale of NaN would make no integers: it counts as zero.
  static DISTORCH_HD float finite_e4m3(uint8_t byte) {
    return (byte & 0x7f) == 0x7f ? 0.0f : e4m3(static_cast<int32_t>(byte));
  }
};

// The same with 6 bits: -32 to 31. Bytes 9..12: the two high bits of each, the first lowest.
struct W6x16 {
  static constexpr int kElements = 16, kBytes = 13, kGroup = 16;
  struct Group {
    float d;
    Halves halves;
    uint32_t high;
  };
  static DISTORCH_HD bool ordinary(const uint8_t*) { return true; }
  static DISTORCH_HD Group open(const uint8_t* block, int) {
    return {W4x16::finite_e4m3(block[0]), halves_at(block + 1), load32(block + 9)};
  }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    const auto place = place_of(i);
    const auto digit = half_at_place(group.halves, place) | packed_at<2>(group.high, place) << 4;
    return to_int8_grid(to_float(digit - 32) * group.d);
  }
};

// convrot_w4a4: -8 to 7, the low half first. The scale is the row's.
struct I4x16 {
  static constexpr int kElements = 16, kBytes = 8, kGroup = 16;
  using Group = Halves;
  static DISTORCH_HD bool ordinary(const uint8_t*) { return true; }
  static DISTORCH_HD Group open(const uint8_t* block, int) { return halves_at(block); }
  template <class I>
  static DISTORCH_HD auto number(const Group& group, I i) {
    return to_float((half_at_place(group, place_of(i)) ^ 8) - 8);
  }
};

// --- descriptions with a table and without ---

template <class Type>
constexpr int kTableOf = 0;
template <class Type>
  requires requires { Type::kTable; }
constexpr int kTableOf<Type> = Type::kTable;

template <class Type>
DISTORCH_HD typename Type::Group open_group(const uint8_t* block, int g, const float* table) {
  if constexpr (kTableOf<Type> > 0)
    return Type::open(block, g, table);
  else
    return Type::open(block, g);
}

template <class Type>
DISTORCH_HD bool is_ordinary(const uint8_t* block, const float* table) {
  if constexpr (kTableOf<Type> > 0)
    return Type::ordinary(block, table);
  else
    return Type::ordinary(block);
}

}  // namespace distorch::blocks
