// SPDX-License-Identifier: Apache-2.0
// What one thread of the decoding kernels does; compiles for hosts too.
#pragma once

#include <cstdint>

#include "core/block_list.h"
#include "core/portable.h"

namespace distorch::cuda {

// Numbers that a thread decodes: a piece of a group of any type, and 16 bytes
// of 16-bit numbers.
constexpr int kRun = 8;

// Numbers [kRun * run, kRun * run + kRun) of `blocks`.
template <class Type>
DISTORCH_HD void decode_run(const uint8_t* blocks, int64_t run, const float* table,
                            float* numbers) {
  static_assert(Type::kGroup % kRun == 0 && Type::kElements % Type::kGroup == 0);
  constexpr int kRuns = Type::kElements / kRun;
  const uint8_t* block = blocks + run / kRuns * Type::kBytes;
  const int first = static_cast<int>(run % kRuns) * kRun;
  const auto group = blocks::open_group<Type>(block, first / Type::kGroup, table);
  for (int i = 0; i < kRun; ++i) numbers[i] = Type::number(group, first % Type::kGroup + i);
}

// The i-th number of types without blocks.
struct PlainFloat32 {
  static constexpr int kBytes = 4;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return as_float(load32(from + 4 * i));
  }
};
struct PlainFloat16 {
  static constexpr int kBytes = 2;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) { return half_at(from + 2 * i); }
};
struct PlainBFloat16 {
  static constexpr int kBytes = 2;
  static DISTORCH_HD float number(const uint8_t* from, int64_t i) {
    return as_float(load16(from + 2 * i) << 16);
  }
};

}  // namespace distorch::cuda
