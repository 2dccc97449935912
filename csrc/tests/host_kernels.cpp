// SPDX-License-Identifier: Apache-2.0
// A library of kernels for tests of what loads it: the host's own, on host memory.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/file.h"
#include "cuda/library.h"

namespace {

using namespace distorch;

constexpr uint64_t kMost = 1 << 20;  // bytes that can be pinned at one time

// Where the memory of a device is on the host, seen from its address.
std::ptrdiff_t distance = 0;
int pinned = 0;  // pieces of pinned memory that are in use
// Of the last call.
int last_device = -1;
CUstream_st* last_stream = nullptr;

template <class T>
T* on_host(T* address) {
  return address == nullptr ? nullptr
                            : reinterpret_cast<T*>(reinterpret_cast<intptr_t>(address) + distance);
}

int decode(int device, const Decoding& decoding, int64_t begin, int64_t end, const void* stored,
           void* into, float* panel, int64_t panel_rows, void* more_terms, uint8_t* finite,
           CUstream_st* stream) {
  constexpr int kInvalidValue = 1;
  if ((cuda::more_terms_bytes(decoding) > 0) != (more_terms != nullptr)) return kInvalidValue;
  if (cuda::needs_panel(decoding) != (panel != nullptr && panel_rows > 0)) return kInvalidValue;
  Decoding here = decoding;
  std::vector<LowRank> terms(decoding.terms.begin(), decoding.terms.end());
  for (LowRank& term : terms) {
    term.up = on_host(term.up);
    term.down = on_host(term.down);
  }
  here.terms = terms;
  here.scales.data = on_host(decoding.scales.data);
  here.table = on_host(decoding.table);
  const bool all = decode_rows(here, begin, end, static_cast<const std::byte*>(on_host(stored)),
                               static_cast<std::byte*>(on_host(into)));
  if (!all && finite != nullptr) *on_host(finite) = 0;
  last_device = device;
  last_stream = stream;
  return 0;
}

int usable() { return DRIVER < 13 ? 35 : 0; }

// Memory that does not begin at a page: CUDA does not promise that it does.
int allocate_pinned(int, void** memory, uint64_t bytes) {
  if (bytes > kMost) return 2;
  auto* whole = static_cast<std::byte*>(std::aligned_alloc(4096, 4096 + round_up(bytes, 4096)));
  *memory = whole + 512;
  std::memset(*memory, 7, bytes);
  pinned += 1;
  return 0;
}

int free_pinned(int, void* memory) {
  std::free(static_cast<std::byte*>(memory) - 512);
  pinned -= 1;
  return 0;
}

int is_capturing(int, CUstream_st*, bool* capturing) {
  *capturing = false;
  return 0;
}

int exchange_capture_mode(int mode) { return mode; }

const char* describe(int error) { return error == 2 ? "out of memory" : "invalid argument"; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void set_distance(std::ptrdiff_t bytes) { distance = bytes; }
EXPORTED int pieces_pinned() { return pinned; }
EXPORTED int device_of_last_call() { return last_device; }
EXPORTED void* stream_of_last_call() { return last_stream; }

EXPORTED const cuda::Kernels* distorch_cuda_kernels() {
  static constexpr cuda::Kernels kernels{VERSION,
                                         &usable,
                                         &decode,
                                         &allocate_pinned,
                                         &free_pinned,
                                         &is_capturing,
                                         &exchange_capture_mode,
                                         &describe};
  return &kernels;
}
