// SPDX-License-Identifier: Apache-2.0
// Which instructions this processor has.
#pragma once

namespace distorch {

#if defined(__x86_64__) && defined(__GNUC__)
inline bool has_sse42() { return __builtin_cpu_supports("sse4.2"); }

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace distorch
