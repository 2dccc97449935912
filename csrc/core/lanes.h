// SPDX-License-Identifier: Apache-2.0
// The words of portable.h for kCount neighbours at once, as vectors of GCC and clang.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/portable.h"

namespace distorch {

// Numbers first, first + 1, .. of a group.
template <int kCount>
struct Places {
  int first;
};

template <class Number, int kCount>
struct VectorOf {
  typedef Number Type __attribute__((vector_size(kCount * sizeof(Number))));
};
template <int kCount>
using Ints = typename VectorOf<int32_t, kCount>::Type;

// The loop becomes one instruction that widens; __builtin_convertvector does not.
template <class Byte, int kCount>
DISTORCH_HD Ints<kCount> load_bytes(const uint8_t* from) {
  int32_t wide[kCount];
  for (int lane = 0; lane < kCount; ++lane) wide[lane] = static_cast<Byte>(from[lane]);
  Ints<kCount> numbers;
  std::memcpy(&numbers, wide, sizeof(numbers));
  return numbers;
}

template <int kCount>
DISTORCH_HD Ints<kCount> byte_at(const uint8_t* from, Places<kCount> i) {
  return load_bytes<uint8_t, kCount>(from + i.first);
}

template <int kCount>
DISTORCH_HD Ints<kCount> signed_byte_at(const uint8_t* from, Places<kCount> i) {
  return load_bytes<int8_t, kCount>(from + i.first);
}

template <int kCount>
DISTORCH_HD Ints<kCount> place_of(Places<kCount> i) {
  Ints<kCount> places;
  for (int lane = 0; lane < kCount; ++lane) places[lane] = i.first + lane;
  return places;
}

template <class Type>
concept AVector = !std::is_arithmetic_v<Type>;

template <AVector Vector>
constexpr int kLanesOf = sizeof(Vector) / sizeof(int32_t);

template <int kBits, AVector Vector>
DISTORCH_HD Vector packed_at(uint32_t word, Vector i) {
  using Words = typename VectorOf<uint32_t, kLanesOf<Vector>>::Type;
  const Words words = (Words{} + word) >> (Words)(kBits * i);
  return (Vector)(words & ((1u << kBits) - 1));
}

template <AVector Vector>
DISTORCH_HD typename VectorOf<float, kLanesOf<Vector>>::Type to_float(Vector numbers) {
  return __builtin_convertvector(numbers, typename VectorOf<float, kLanesOf<Vector>>::Type);
}

template <class Number>
using FloatsOf = typename VectorOf<float, kLanesOf<Number>>::Type;

template <AVector Vector>
DISTORCH_HD FloatsOf<Vector> float_of(Vector bits) {
  return (FloatsOf<Vector>)bits;
}

template <AVector Floats, AVector Vector>
DISTORCH_HD Floats flipped(Floats number, Vector bits) {
  return (Floats)((Vector)number ^ bits);
}

template <AVector Vector>
DISTORCH_HD FloatsOf<Vector> entry_of(const float* table, Vector index) {
  FloatsOf<Vector> entries;
#if !defined(__clang__)
  if constexpr (kLanesOf<Vector> == 16) {  // one instruction
    std::memcpy(&entries, table, sizeof(entries));
    return __builtin_shuffle(entries, index);
  }
#endif
  for (int lane = 0; lane < kLanesOf<Vector>; ++lane) entries[lane] = table[index[lane]];
  return entries;
}

template <AVector Vector>
DISTORCH_HD Vector times_plus(float a, Vector b, float c) {
  return a * b + c;
}

}  // namespace distorch
