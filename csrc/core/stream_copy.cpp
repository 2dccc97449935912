// SPDX-License-Identifier: Apache-2.0
#include "core/stream_copy.h"

#include <cstring>

#include "core/processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace distorch {
namespace {

constexpr uint64_t kLine = 64;

#if defined(__x86_64__)
// REQUIRES: `into` is a multiple of kLine, `bytes` too.
__attribute__((target("avx2"))) void copy_lines(std::byte* into, const std::byte* from,
                                                uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at + 8 * kLine), _MM_HINT_NTA);
    const auto* source = reinterpret_cast<const __m256i*>(from + at);
    auto* target = reinterpret_cast<__m256i*>(into + at);
    const __m256i low = _mm256_loadu_si256(source);
    const __m256i high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
  }
  _mm_sfence();
}

bool has_lines() { return has_avx2(); }
#else
void copy_lines(std::byte* into, const std::byte* from, uint64_t bytes) {
  std::memcpy(into, from, bytes);
}

bool has_lines() { return false; }
#endif

}  // namespace

void stream_copy(std::byte* into, const std::byte* from, uint64_t bytes) {
  static const bool lines = has_lines();
  const uint64_t head = -reinterpret_cast<uintptr_t>(into) % kLine;
  if (!lines || bytes < head + kLine) {
    std::memcpy(into, from, bytes);
    return;
  }
  std::memcpy(into, from, head);
  const uint64_t middle = (bytes - head) / kLine * kLine;
  copy_lines(into + head, from + head, middle);
  std::memcpy(into + head + middle, from + head + middle, bytes - head - middle);
}

}  // namespace distorch
