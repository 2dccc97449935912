// A library of kernels for tests of what loads it: the host's own, on host memory.
#include <cstdlib>
#include <cstring>

#include "cuda/library.h"

namespace {

using namespace distorch;

constexpr uint64_t kMost = 1 << 20;  // bytes that can be pinned at one time

int decode(const Decoding& decoding, int64_t begin, int64_t end, const void* stored, void* into,
           float*, int64_t, uint8_t* finite, CUstream_st*) {
  const bool all = decode_rows(decoding, begin, end, static_cast<const std::byte*>(stored),
                               static_cast<std::byte*>(into));
  if (!all && finite != nullptr) *finite = 0;
  return 0;
}

int allocate_pinned(void** memory, uint64_t bytes) {
  if (bytes > kMost) return 2;
  *memory = std::malloc(bytes);
  std::memset(*memory, 7, bytes);
  return 0;
}

int free_pinned(void* memory) {
  std::free(memory);
  return 0;
}

const char* describe(int) { return "out of memory"; }

}  // namespace

extern "C" __attribute__((visibility("default"))) const cuda::Kernels* distorch_cuda_kernels() {
  static constexpr cuda::Kernels kernels{VERSION, &decode, &allocate_pinned, &free_pinned,
                                         &describe};
  return &kernels;
}
