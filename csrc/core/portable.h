// SPDX-License-Identifier: Apache-2.0
// What lets one source be a host kernel for several vector widths and a CUDA kernel.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define DISTORCH_HD __host__ __device__ __forceinline__
#else
#define DISTORCH_HD inline __attribute__((always_inline))
#endif

namespace distorch {

DISTORCH_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

DISTORCH_HD uint32_t as_bits(float number) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(number);
#else
  return std::bit_cast<uint32_t>(number);
#endif
}

// Little-endian numbers at any address.
DISTORCH_HD uint32_t load16(const uint8_t* from) {
  return from[0] | static_cast<uint32_t>(from[1]) << 8;
}

DISTORCH_HD uint32_t load32(const uint8_t* from) { return load16(from) | load16(from + 2) << 16; }

// IEEE float16 to float32. No float32 subnormal is met on the way, so that a
// thread that flushes them (torch.set_flush_denormal) gets the same numbers.
// Masks instead of conditions: compilers make branches of those, and the signs
// of scales cannot be predicted.
DISTORCH_HD float half_of(uint32_t bits) {
  const uint32_t shifted = (bits & 0x7fffu) << 13;
  const uint32_t subnormal = as_bits(as_float(shifted + (113u << 23)) - 0x1p-14f);
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(shifted < 0x00800000u);
  const uint32_t is_special = 0u - static_cast<uint32_t>(shifted >= 0x0f800000u);  // inf and NaN
  const uint32_t normal = shifted + (112u << 23) + (is_special & 112u << 23);
  const uint32_t magnitude = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return as_float(magnitude | (bits & 0x8000u) << 16);
}

DISTORCH_HD float half_at(const uint8_t* from) { return half_of(load16(from)); }

// --- what block descriptions do with their i-th number ---
//
// `i` is an int here; lanes.h has the same words for several neighbours at once.

DISTORCH_HD int32_t byte_at(const uint8_t* from, int i) { return from[i]; }

DISTORCH_HD int32_t signed_byte_at(const uint8_t* from, int i) {
  return static_cast<int8_t>(from[i]);
}

// i itself, as a number.
DISTORCH_HD int32_t place_of(int i) { return i; }

// The i-th of the numbers packed into a word, kBits bits each, the first lowest.
template <int kBits>
DISTORCH_HD int32_t packed_at(uint32_t word, int32_t i) {
  return static_cast<int32_t>(word >> kBits * i & ((1u << kBits) - 1));
}

// The number with these bits.
DISTORCH_HD float float_of(int32_t bits) { return as_float(static_cast<uint32_t>(bits)); }

// The number with some of its bits turned over, such as the sign.
DISTORCH_HD float flipped(float number, int32_t bits) {
  return as_float(as_bits(number) ^ static_cast<uint32_t>(bits));
}

// One of 16 numbers.
DISTORCH_HD float entry_of(const float* table, int32_t index) { return table[index]; }

DISTORCH_HD float to_float(int32_t number) { return static_cast<float>(number); }

// a * b + c with both roundings. Hosts compile this under fp-contract=off.
DISTORCH_HD float times_plus(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

}  // namespace distorch

#if !defined(__CUDACC__)
#include "core/lanes.h"
#endif
