#include "device/cuda.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <mutex>

namespace distorch {
namespace {

struct Library {
  std::mutex mutex;
  std::string path;                        // guarded by mutex
  bool looked = false;                     // guarded by mutex
  const cuda::Kernels* kernels = nullptr;  // guarded by mutex
};

Library& library() {
  static Library& instance = *new Library;
  return instance;
}

const cuda::Kernels* load(const std::string& path) {
  if (path.empty()) return nullptr;
  // Never closed: kernels may run until the process ends.
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return nullptr;
  const auto table =
      reinterpret_cast<decltype(&distorch_cuda_kernels)>(::dlsym(handle, "distorch_cuda_kernels"));
  const cuda::Kernels* kernels = table != nullptr ? table() : nullptr;
  if (kernels == nullptr || kernels->version != cuda::kLibraryVersion) return nullptr;
  return kernels->usable() == 0 ? kernels : nullptr;
}

}  // namespace

void set_cuda_library(std::string path) {
  std::lock_guard lock(library().mutex);
  library().path = std::move(path);
}

const cuda::Kernels* cuda_kernels() {
  Library& known = library();
  std::lock_guard lock(known.mutex);
  if (!known.looked) {
    known.looked = true;
    known.kernels = load(known.path);
  }
  return known.kernels;
}

void check_cuda(const cuda::Kernels& kernels, int error, const char* what) {
  TORCH_CHECK(error == 0, what, ": CUDA says '", kernels.describe(error), "' (", error, ")");
}

void decode_on_gpu(c10::Device device, const Decoding& decoding, int64_t rows, const void* stored,
                   void* into, const DecodeScratch& scratch) {
  const cuda::Kernels* kernels = cuda_kernels();
  TORCH_CHECK_NOT_IMPLEMENTED(kernels != nullptr,
                              "distorch has no kernels for CUDA devices here: it was built without "
                              "nvcc (DISTORCH_CUDA=1 says why), or with a newer CUDA than this "
                              "machine's driver");
  TORCH_CHECK_VALUE(
      decoding.code->elements == 1 || reinterpret_cast<uintptr_t>(into) % cuda::kDecodeAlign == 0,
      "blocks are decoded to memory aligned to ", cuda::kDecodeAlign, " bytes");
  const c10::OptionalDeviceGuard on_device{device};
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const int error = kernels->decode(device.index(), decoding, 0, rows, stored, into, scratch.panel,
                                    scratch.panel_rows, scratch.more_terms, scratch.finite,
                                    static_cast<CUstream_st*>(stream.native_handle()));
  check_cuda(*kernels, error, "decoding a weight");
}

}  // namespace distorch
