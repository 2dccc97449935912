// SPDX-License-Identifier: Apache-2.0
// Numbers that look like chance and are the same on every run and machine.
#pragma once

#include <cstdint>

namespace distorch {

// Marsaglia's xorshift: fast, and good enough to choose what is tried next.
class Numbers {
 public:
  explicit Numbers(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15ULL | 1) {}
  uint64_t below(uint64_t limit) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % limit;
  }

 private:
  uint64_t state_;
};

}  // namespace distorch
