// SPDX-License-Identifier: Apache-2.0
// The chain of multiply-adds that an element of a product is, one or two steps at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "core/merge.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DISTORCH_X86 1
#ifndef __clang__  // which lets no instruction be inlined from a template into a function for it
#define DISTORCH_PAIRS 1
#endif
#endif
#define DISTORCH_INLINE inline __attribute__((always_inline))

namespace distorch {

// One multiply-add in each place. kFused: the target has an instruction for it,
// into which compilers contract the expression.
template <class Element, bool kFused>
struct Singles {
  using Sum = Element;
  using Factors = Sum;  // of a step
  static constexpr int kPerStep = 1;
  static constexpr bool kFinite = false;  // whether products are, always
  static DISTORCH_INLINE Factors pack(float factor, float) { return factor; }

  template <class Lane>
  static DISTORCH_INLINE void step(Factors a, const Lane& b, Lane& sum) {
    if constexpr (kFused) {
      sum += a * b;
    } else {
      for (size_t i = 0; i < sizeof(Lane) / sizeof(Sum); ++i) sum[i] = std::fma(a, b[i], sum[i]);
    }
  }
};

// Note [Pairs of bfloat16]
// vdpbf16ps multiplies two pairs of bfloat16 numbers and adds the products to a
// float32 sum, that of the high halves first, each with one rounding: two steps
// of a chain, at twice the pace. It differs from two multiply-adds in one point:
// subnormal numbers count as zero. So factors are packed in pairs
// if all are bfloat16 and the last bit of their smallest product is a normal
// number: every sum is a multiple of that bit. Nor may their largest products
// add up to infinity, so that nobody need look for it. Whether a processor does
// round like this is tried before it is relied upon.
struct Pairs {
  using Sum = float;
  using Factors = uint32_t;
  static constexpr int kPerStep = 2;
  static constexpr bool kFinite = true;
  static DISTORCH_INLINE Factors pack(float first, float second) {
    return std::bit_cast<uint32_t>(first) | std::bit_cast<uint32_t>(second) >> 16;
  }

#ifdef DISTORCH_PAIRS
  template <class Lane, class FactorLane>
  static DISTORCH_INLINE void step(Factors a, const FactorLane& b, Lane& sum) {
    const FactorLane everywhere = FactorLane{} + a;
    Lane next = sum;  // a register: of elements of arrays compilers make memory
    asm("vdpbf16ps %2, %1, %0" : "+v"(next) : "v"(b), "v"(everywhere));
    sum = next;
  }

  // Whether this processor's steps are those of Singles. REQUIRES: it has them.
  static DISTORCH_INLINE bool are_chains();
#endif

  // Whether these factors may be packed, rows [begin, end) of `up`.
  static DISTORCH_INLINE bool fit(std::span<const LowRank> terms, int64_t begin, int64_t end,
                                  int64_t columns);
};

// What the magnitudes of some float32 numbers have in common.
struct Magnitudes {
  uint32_t beyond_bfloat16 = 0;  // bits of any
  uint32_t largest = 0;
  uint32_t smallest_less_1 = ~0u;  // of those that are not zero

  static DISTORCH_INLINE Magnitudes of(const float* numbers, int64_t count) {
    Magnitudes found;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(numbers[i]) & 0x7fffffffu;
      found.beyond_bfloat16 |= bits & 0xffffu;
      found.largest = std::max(found.largest, bits);
      found.smallest_less_1 = std::min(found.smallest_less_1, bits - 1);  // zero: the largest
    }
    return found;
  }

  bool are_normal() const { return smallest_less_1 >= 0x00800000u - 1; }  // or zero
  double most() const { return std::bit_cast<float>(largest); }
  double least() const {  // infinity if all are zero
    return largest == 0 ? INFINITY : std::bit_cast<float>(smallest_less_1 + 1);
  }
};

bool Pairs::fit(std::span<const LowRank> terms, int64_t begin, int64_t end, int64_t columns) {
  // Of factors 2^a and 2^b times [1, 2): a product is below 2^(a + b + 2), its last bit is
  // 2^(a + b - 14), and that shall be 2^-126 or more.
  constexpr double kSmallest = 0x1p-126 * 0x1p14 * 2, kLargest = 0x1p126;
  for (const LowRank& term : terms) {
    const int64_t first = std::max<int64_t>(begin - term.first_row, 0);
    const int64_t last = std::min(end - term.first_row, term.rows);
    if (first >= last) continue;
    const auto up = Magnitudes::of(term.up + first * term.rank, (last - first) * term.rank);
    if (up.beyond_bfloat16 != 0 || !up.are_normal()) return false;
    const auto down = Magnitudes::of(term.down, term.rank * columns);
    if (down.beyond_bfloat16 != 0 || !down.are_normal()) return false;
    const double most = up.most() * down.most() * static_cast<double>(term.rank);
    if (!(most < kLargest) || !(up.least() * down.least() >= kSmallest)) return false;  // or NaN
  }
  return true;
}

#ifdef DISTORCH_PAIRS
bool Pairs::are_chains() {
  constexpr int kLanes = 16, kChains = 256, kSteps = 4;
  typedef float Lane __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint32_t FactorLane __attribute__((vector_size(kLanes * sizeof(float))));
  uint64_t state = 1;
  uint32_t spread = 1;  // of exponents
  // A bfloat16 number in the high half: sums of several cancel and round often.
  const auto next = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto bits = static_cast<uint32_t>(state >> 32);
    return std::bit_cast<float>((bits & 0x807f0000u) | (118 + (bits >> 8) % spread) << 23);
  };
  for (int chain = 0; chain < kChains; ++chain) {
    spread = 1 + chain % 24;
    Lane sum = {};
    float expected[kLanes] = {};
    for (int step = 0; step < kSteps; ++step) {
      const float a[] = {next(), next()};
      FactorLane packed = {};
      for (int i = 0; i < kLanes; ++i) {
        const float b[] = {next(), next()};
        packed[i] = pack(b[0], b[1]);
        expected[i] = std::fma(a[1], b[1], std::fma(a[0], b[0], expected[i]));
      }
      Pairs::step(pack(a[0], a[1]), packed, sum);
    }
    if (std::memcmp(expected, &sum, sizeof(expected)) != 0) return false;
  }
  return true;
}
#endif

}  // namespace distorch
