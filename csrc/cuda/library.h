// The library of GPU kernels as others see it: one table of functions.
//
// It is compiled by nvcc, knows no torch, and is loaded when it is first needed
// (device/cuda.h), so that one build works with and without a GPU. Its CUDA
// runtime is linked statically; contexts and streams are the process's own.
#pragma once

#include <cstdint>

#include "core/decode.h"

struct CUstream_st;

namespace distorch::cuda {

// Both sides are of one build.
constexpr int kLibraryVersion = 1;

struct Kernels {
  int version;
  // What decode_rows (core/decode.h) does for rows [begin, end), on device
  // memory (factors and scales, too) and on `stream`: the same bits, NaN
  // payloads aside. `panel` has room for `panel_rows` rows of float32, at least
  // one; it is not used where rows need no float32 in between. `finite` (on the
  // device; may be null) becomes 0 when a product is not.
  int (*decode)(const Decoding& decoding, int64_t begin, int64_t end, const void* stored,
                void* into, float* panel, int64_t panel_rows, uint8_t* finite, CUstream_st* stream);
  // Pinned host memory of exactly that size, for copies from and to every device.
  int (*allocate_pinned)(void** memory, uint64_t bytes);
  int (*free_pinned)(void* memory);
  // Of a cudaError_t, which all functions above return (0: no error).
  const char* (*describe)(int error);
};

// Whether decode() needs a panel.
inline bool needs_panel(const Decoding& decoding) {
  if (decoding.in_place()) return false;
  const bool blocks = decoding.code->elements > 1;
  return !decoding.terms.empty() || (blocks && decoding.scales.data != nullptr);
}

}  // namespace distorch::cuda

extern "C" const distorch::cuda::Kernels* distorch_cuda_kernels();
