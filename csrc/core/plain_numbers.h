// SPDX-License-Identifier: Apache-2.0
// Numbers of 8 bits, for hosts and for GPUs.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace distorch {

// The i-th number of each type, exact in float32.
// 8-bit floating point without infinities: exponent bias 7, NaN is all ones.
struct Float8E4M3FN {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    const uint32_t bits = from[i], sign = (bits & 0x80u) << 24, magnitude = bits & 0x7fu;
    if (magnitude == 0x7fu) return as_float(sign | 0x7fc00000u);
    if (magnitude < 8) return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-9f));
    return as_float(sign | ((magnitude << 20) + (120u << 23)));
  }
};
// The upper half of a float16.
struct Float8E5M2 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return half_of(static_cast<uint32_t>(from[i]) << 8);
  }
};
struct Int8 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return static_cast<float>(static_cast<int8_t>(from[i]));
  }
};
struct UInt8 {
  static constexpr int kBytes = 1;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return static_cast<float>(from[i]);
  }
};

}  // namespace distorch
