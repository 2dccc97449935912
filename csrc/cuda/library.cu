// SPDX-License-Identifier: Apache-2.0
#include "cuda/library.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "core/blocks.h"
#include "cuda/dequantise.cuh"
#include "cuda/merge.cuh"
#include "cuda/numbers.cuh"
#include "cuda/rotation.cuh"

// `distorch doctor` reads from the file how it was built, without loading it
// (distorch/_library.py).
#define DISTORCH_TEXT_OF(...) #__VA_ARGS__
#define DISTORCH_TEXT(...) DISTORCH_TEXT_OF(__VA_ARGS__)
extern "C" __attribute__((used, visibility("default"))) const char distorch_built_with[] =
    "distorch kernels: CUDA " DISTORCH_TEXT(__CUDACC_VER_MAJOR__) "." DISTORCH_TEXT(
        __CUDACC_VER_MINOR__) ", architectures " DISTORCH_TEXT(__CUDA_ARCH_LIST__);

namespace distorch::cuda {
namespace {

// Rows as float32 or as what the weight is, before they are turned back and patched.
int widen(const Decoding& decoding, const Scales& scales, int64_t begin, int64_t rows,
          const void* stored, Element out_type, void* into, cudaStream_t stream) {
  const int64_t columns = decoding.columns;
  const std::string_view code = decoding.code->name;
  if (decoding.code->elements == 1) {
    return scale(code, stored, begin, rows, columns, scales, out_type, into, stream);
  }
  const auto type = block_type_named(code);
  if (!type) return cudaErrorInvalidValue;
  const int64_t blocks = rows * columns / decoding.code->elements;
  const int error = dequantise(*type, stored, blocks, decoding.table, out_type, into, stream);
  if (error != cudaSuccess || scales.data == nullptr) return error;
  // REQUIRES: out_type is float32 (needs_panel).
  return scale("float32", into, begin, rows, columns, scales, out_type, into, stream);
}

// Rows as float32 with all but their patches: as decode_rows (core/decode.h) does.
int fill_panel(const Decoding& decoding, int64_t begin, int64_t rows, const void* stored,
               float* panel, cudaStream_t stream) {
  const int64_t columns = decoding.columns;
  const bool scaled_first = decoding.code->scaled_before_rotation || decoding.rotation == 0;
  int error = widen(decoding, scaled_first ? decoding.scales : Scales{}, begin, rows, stored,
                    Element::kFloat32, panel, stream);
  if (error != cudaSuccess || decoding.rotation == 0) return error;
  error = rotate_back(panel, rows * columns, decoding.rotation,
                      scaled_first ? decoding.rounded_first() : Element::kFloat32, stream);
  if (error != cudaSuccess || scaled_first || decoding.scales.data == nullptr) return error;
  return scale("float32", panel, begin, rows, columns, decoding.scales, Element::kFloat32, panel,
               stream);
}

std::vector<LowRank> from_row(std::span<const LowRank> terms, int64_t begin) {
  std::vector<LowRank> shifted(terms.begin(), terms.end());
  for (LowRank& term : shifted) term.first_row -= begin;
  return shifted;
}

// An error of one call must not be taken for the next launch's.
int told(int error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Not undone: it is what the caller has made current. -1: whichever that is.
int make_current(int device) {
  if (device < 0) return cudaSuccess;
  int now = -1;
  const cudaError_t error = cudaGetDevice(&now);
  if (error == cudaSuccess && now == device) return error;
  return cudaSetDevice(device);
}

int queue_decoding(const Decoding& decoding, int64_t begin, int64_t end, const void* stored,
                   void* into, float* panel, int64_t panel_rows, void* more_terms, uint8_t* finite,
                   cudaStream_t stream) {
  const int64_t rows = end - begin, columns = decoding.columns;
  if (decoding.in_place()) {
    if (!decoding.terms.empty()) {
      return merge(decoding.out, stored, decoding.out, into, rows, columns,
                   from_row(decoding.terms, begin), more_terms, finite, stream);
    }
    if (stored == into) return cudaSuccess;
    const auto bytes = static_cast<size_t>(rows * decoding.stored_row());
    return cudaMemcpyAsync(into, stored, bytes, cudaMemcpyDeviceToDevice, stream);
  }
  if (!needs_panel(decoding)) {
    return widen(decoding, decoding.scales, begin, rows, stored, decoding.out, into, stream);
  }
  const auto* from = static_cast<const std::byte*>(stored);
  auto* to = static_cast<std::byte*>(into);
  for (int64_t row = begin; row < end; row += panel_rows) {
    const int64_t count = std::min(panel_rows, end - row);
    int error = fill_panel(decoding, row, count, from + (row - begin) * decoding.stored_row(),
                           panel, stream);
    if (error != cudaSuccess) return error;
    error =
        merge(Element::kFloat32, panel, decoding.out, to + (row - begin) * decoding.decoded_row(),
              count, columns, from_row(decoding.terms, row), more_terms, finite, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int usable() {
  int driver = 0, runtime = 0;  // no driver at all: 0
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&runtime);
  if (error != cudaSuccess) return told(error);
  constexpr int kMajor = 1000;  // newer minor versions run on the driver of the first
  return driver != 0 && driver / kMajor < runtime / kMajor ? cudaErrorInsufficientDriver
                                                           : cudaSuccess;
}

int decode(int device, const Decoding& decoding, int64_t begin, int64_t end, const void* stored,
           void* into, float* panel, int64_t panel_rows, void* more_terms, uint8_t* finite,
           CUstream_st* stream) {
  const int error = make_current(device);
  if (error != cudaSuccess) return told(error);
  return told(queue_decoding(decoding, begin, end, stored, into, panel, panel_rows, more_terms,
                             finite, stream));
}

int allocate_pinned(int device, void** memory, uint64_t bytes) {
  const int error = make_current(device);
  return told(error != cudaSuccess ? error : cudaHostAlloc(memory, bytes, cudaHostAllocPortable));
}

int free_pinned(int device, void* memory) {
  const int error = make_current(device);
  return told(error != cudaSuccess ? error : cudaFreeHost(memory));
}

int is_capturing(int device, CUstream_st* stream, bool* capturing) {
  const int error = make_current(device);
  if (error != cudaSuccess) return told(error);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const int asked = cudaStreamIsCapturing(stream, &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return told(asked);
}

int exchange_capture_mode(int mode) {
  static_assert(kRelaxedCapture == cudaStreamCaptureModeRelaxed);
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  told(cudaThreadExchangeStreamCaptureMode(&exchanged));
  return exchanged;
}

const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace
}  // namespace distorch::cuda

extern "C" __attribute__((visibility("default"))) const distorch::cuda::Kernels*
distorch_cuda_kernels() {
  using namespace distorch::cuda;
  static constexpr Kernels kernels{kLibraryVersion,        &usable,      &decode,
                                   &allocate_pinned,       &free_pinned, &is_capturing,
                                   &exchange_capture_mode, &describe};
  return &kernels;
}
