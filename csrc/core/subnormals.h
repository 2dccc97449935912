// SPDX-License-Identifier: Apache-2.0
// Arithmetic as IEEE says, whatever mode the calling thread is in.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace distorch {

// While it lives, this thread computes with subnormal numbers: after
// torch.set_flush_denormal(True) threads would take them for zero, and a weight
// would depend on who decodes which of its rows.
class KeepSubnormals {
 public:
  KeepSubnormals() : before_(mode()) { set_mode(before_ & ~kFlush); }
  ~KeepSubnormals() { set_mode(before_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // results, and operands
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1 << 24;
  static uint64_t mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif

  const uint64_t before_;
};

}  // namespace distorch
