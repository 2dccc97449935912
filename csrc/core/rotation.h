// SPDX-License-Identifier: Apache-2.0
// ConvRot: weights that were turned by a Hadamard matrix before they were rounded.
//
// Note [Turning back]
// A row is cut into groups of `group` numbers, a power of 4, and each group x was
// stored as H x. H is the product (Kronecker) of matrices of 4 with 1 everywhere
// but -1 from the upper right to the lower left, divided by the root of `group`.
// It is its own inverse, so that turning once more gives x.
//
// It is done in one stage for each factor 4: quads of numbers 1, 4, 16, .. apart,
// in that order. All sums are in float32 and in one order, so that the bits are the
// same on every processor and GPU. The root is a power of 2 and changes no digits.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace distorch {

inline constexpr int64_t kLargestRotation = 4096;  // numbers in a group

constexpr bool is_rotation(int64_t group) {
  if (group < 4 || group > kLargestRotation) return false;
  int64_t power = 4;
  while (power < group) power *= 4;
  return power == group;
}

// Each number of a quad becomes the sum of all four, minus twice the number opposite to it: d is
// opposite to a, c to b. `Number` is a float or a vector of floats.
template <class Number>
DISTORCH_HD void turn_quad(Number& a, Number& b, Number& c, Number& d) {
  const Number sum = (a + b) + (c + d);
  const Number a_was = a, b_was = b;
  a = sum - (d + d);
  b = sum - (c + c);
  c = sum - (b_was + b_was);
  d = sum - (a_was + a_was);
}

// 1 / root of the group, exact.
DISTORCH_HD float rotation_scale(int64_t group) {
  float scale = 1;
  for (; group > 1; group /= 4) scale *= 0.5f;
  return scale;
}

// Turns `count` numbers back in place, group by group. REQUIRES: is_rotation(group), and `count` is
// a multiple of it.
void rotate_back(float* numbers, int64_t count, int64_t group);

}  // namespace distorch
