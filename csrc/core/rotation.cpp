// SPDX-License-Identifier: Apache-2.0
#include "core/rotation.h"

#include <cstring>

// Loops become vectors at this level only.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

namespace distorch {
namespace {

// Four neighbours: every processor has vectors of this size.
typedef float Four __attribute__((vector_size(16)));

Four load(const float* from) {
  Four numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

void store(const Four& numbers, float* into) { std::memcpy(into, &numbers, sizeof numbers); }

// Lanes kI, kJ of one vector and kK, kL of another.
template <int kI, int kJ, int kK, int kL>
Four lanes_of(const Four& one, const Four& other) {
#if defined(__clang__)
  return __builtin_shufflevector(one, other, kI, kJ, kK + 4, kL + 4);
#else
  typedef int Places __attribute__((vector_size(16)));
  return __builtin_shuffle(one, other, Places{kI, kJ, kK + 4, kL + 4});
#endif
}

void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab_low = lanes_of<0, 1, 0, 1>(a, b), ab_high = lanes_of<2, 3, 2, 3>(a, b);
  const Four cd_low = lanes_of<0, 1, 0, 1>(c, d), cd_high = lanes_of<2, 3, 2, 3>(c, d);
  a = lanes_of<0, 2, 0, 2>(ab_low, cd_low);
  b = lanes_of<1, 3, 1, 3>(ab_low, cd_low);
  c = lanes_of<0, 2, 0, 2>(ab_high, cd_high);
  d = lanes_of<1, 3, 1, 3>(ab_high, cd_high);
}

// The stages of quads 1 and 4 apart, of 16 neighbours.
void turn_sixteen(float* numbers) {
  Four a = load(numbers), b = load(numbers + 4), c = load(numbers + 8), d = load(numbers + 12);
  transpose(a, b, c, d);
  turn_quad(a, b, c, d);
  transpose(a, b, c, d);
  turn_quad(a, b, c, d);
  store(a, numbers);
  store(b, numbers + 4);
  store(c, numbers + 8);
  store(d, numbers + 12);
}

void turn_four(float* numbers) { turn_quad(numbers[0], numbers[1], numbers[2], numbers[3]); }

void turn_stage(float* group, int64_t size, int64_t apart) {
  for (int64_t first = 0; first < size; first += 4 * apart) {
    for (int64_t i = first; i < first + apart; i += 4) {
      Four a = load(group + i), b = load(group + i + apart);
      Four c = load(group + i + 2 * apart), d = load(group + i + 3 * apart);
      turn_quad(a, b, c, d);
      store(a, group + i);
      store(b, group + i + apart);
      store(c, group + i + 2 * apart);
      store(d, group + i + 3 * apart);
    }
  }
}

}  // namespace

void rotate_back(float* numbers, int64_t count, int64_t group) {
  const float scale = rotation_scale(group);
  for (float* first = numbers; first < numbers + count; first += group) {
    if (group == 4) {
      turn_four(first);
    } else {
      for (int64_t i = 0; i < group; i += 16) turn_sixteen(first + i);
      for (int64_t apart = 16; apart < group; apart *= 4) turn_stage(first, group, apart);
    }
    for (int64_t i = 0; i < group; ++i) first[i] *= scale;
  }
}

}  // namespace distorch
