// SPDX-License-Identifier: Apache-2.0
// The library of GPU kernels as others see it: one table of functions.
//
// It is compiled by nvcc, knows no torch, and is loaded when it is first needed
// (device/cuda.h), so that one build works with and without a GPU.
//
// Note [Two CUDA runtimes]
// Its CUDA runtime is linked statically, beside the one that torch loaded. Both
// stand on the driver's primary contexts, so memory, streams and events of one
// are good in the other. What each has of its own is the thread's last error
// (functions here leave none behind) and maybe the thread's current device: so
// every function is told the device, which the caller has made current in torch.
#pragma once

#include <cstdint>

#include "core/decode.h"

struct CUstream_st;

namespace distorch::cuda {

// Both sides are of one build.
constexpr int kLibraryVersion = 4;

struct Kernels {
  int version;
  // An error where the machine's driver is older than the runtime in here. Looks
  // at no device and makes no context.
  int (*usable)();
  // What decode_rows (core/decode.h) does for rows [begin, end), on device
  // memory (factors and scales, too) and on `stream`: the same bits, NaN
  // payloads aside. `panel` has room for `panel_rows` rows of float32, at least
  // one; it is not used where rows need no float32 in between. `finite` (on the
  // device; may be null) becomes 0 when a product is not. `into` and `panel` are
  // aligned to kDecodeAlign where rows are stored as blocks. `more_terms` has
  // more_terms_bytes() on the device, for terms that do not travel with a launch.
  int (*decode)(int device, const Decoding& decoding, int64_t begin, int64_t end,
                const void* stored, void* into, float* panel, int64_t panel_rows, void* more_terms,
                uint8_t* finite, CUstream_st* stream);
  // Pinned host memory of exactly that size, for copies from and to every device.
  // `device` gets a context if it has none; no other one does.
  int (*allocate_pinned)(int device, void** memory, uint64_t bytes);
  // Of that device. CUDA does not promise that this waits for copies from and to
  // the memory: the caller has waited for them.
  int (*free_pinned)(int device, void* memory);
  // Whether work on `stream` is being recorded for a graph, instead of done.
  int (*is_capturing)(int device, CUstream_st* stream, bool* capturing);
  // What this thread may do while another one captures a graph, from now on: a
  // cudaStreamCaptureMode. Gives what it was.
  int (*exchange_capture_mode)(int mode);
  // Of a cudaError_t, which all functions above return (0: no error).
  const char* (*describe)(int error);
};

constexpr int kRelaxedCapture = 2;  // cudaStreamCaptureModeRelaxed

constexpr uint64_t kDecodeAlign = 16;

// Patches of a weight that travel with a launch's arguments, which hold 4 KB.
constexpr uint64_t kTermsInLaunch = 64;

// Bytes on the device for the patches beyond those.
inline uint64_t more_terms_bytes(const Decoding& decoding) {
  const uint64_t terms = decoding.terms.size();
  return terms > kTermsInLaunch ? (terms - kTermsInLaunch) * sizeof(LowRank) : 0;
}

// Whether decode() needs a panel.
inline bool needs_panel(const Decoding& decoding) {
  if (decoding.in_place()) return false;
  const bool blocks = decoding.code->elements > 1;
  return !decoding.terms.empty() || decoding.rotation > 0 ||
         (blocks && decoding.scales.data != nullptr);
}

}  // namespace distorch::cuda

extern "C" const distorch::cuda::Kernels* distorch_cuda_kernels();
