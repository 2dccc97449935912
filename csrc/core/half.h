// SPDX-License-Identifier: Apache-2.0
// 16-bit floating-point numbers as bits, to and from float32, rounding to nearest even.
#pragma once

#include <bit>
#include <cstdint>

#include "core/element.h"
#include "core/portable.h"

namespace distorch {

inline float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t bits) { return half_of(bits); }

inline uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: the mantissa is cut to 10 bits, a carry moves into the exponent.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal ones: an addition of 0.5 leaves the rounded multiple of 2^-24 in the lowest bits.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds beyond 65504
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(sign | result);
}

// The nearest number of a type.
inline float rounded_to(Element type, float value) {
  if (type == Element::kFloat16) return from_float16(to_float16(value));
  if (type == Element::kBFloat16) return from_bfloat16(to_bfloat16(value));
  return value;
}

}  // namespace distorch
