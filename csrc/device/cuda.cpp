// SPDX-License-Identifier: Apache-2.0
#include "device/cuda.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <vector>

#include "core/mutex.h"

namespace distorch {
namespace {

constexpr int64_t kPanelBytes = 32 << 20;  // of float32 rows on a device, at one time

struct Library {
  Mutex mutex;
  std::string path GUARDED_BY(mutex);
  bool looked GUARDED_BY(mutex) = false;
  const cuda::Kernels* kernels GUARDED_BY(mutex) = nullptr;
};

Library& library = *new Library;

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
  const MutexLock lock(library.mutex);
  library.path = std::move(path);
}

const cuda::Kernels* cuda_kernels() {
  const MutexLock lock(library.mutex);
  if (!library.looked) {
    library.looked = true;
    library.kernels = load(library.path);
  }
  return library.kernels;
}

void check_cuda(const cuda::Kernels& kernels, int error, const char* what) {
  TORCH_CHECK(error == 0, what, ": CUDA says '", kernels.describe(error), "' (", error, ")");
}

void decode_on_cuda(const DecodeJob& job) {
  const cuda::Kernels* kernels = cuda_kernels();
  TORCH_CHECK_NOT_IMPLEMENTED(kernels != nullptr,
                              "distorch has no kernels for CUDA devices here: it was built without "
                              "nvcc (DISTORCH_CUDA=1 says why), or with a newer CUDA than this "
                              "machine's driver");
  const std::vector<LowRank> terms = low_rank_of(job.terms);
  const Decoding decoding = decoding_of(job.recipe, terms);
  void* to = job.into.mutable_data_ptr();
  TORCH_CHECK_VALUE(
      decoding.code->elements == 1 || reinterpret_cast<uintptr_t>(to) % cuda::kDecodeAlign == 0,
      "blocks are decoded to memory aligned to ", cuda::kDecodeAlign, " bytes");
  const c10::Device device = job.into.device();
  const c10::OptionalDeviceGuard on_device{device};
  const RowRecipe& recipe = job.recipe;
  const auto scratch = [&](int64_t bytes) {
    return at::empty({bytes}, job.into.options().dtype(at::kByte));
  };
  at::Tensor panel, more_terms;
  int64_t panel_rows = 0;
  if (cuda::needs_panel(decoding)) {
    const auto row_bytes = recipe.columns * static_cast<int64_t>(sizeof(float));
    panel_rows = std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(row_bytes, 1), 1,
                                     std::max<int64_t>(recipe.rows, 1));
    panel = scratch(panel_rows * row_bytes);
  }
  if (const uint64_t bytes = cuda::more_terms_bytes(decoding)) {
    more_terms = scratch(static_cast<int64_t>(bytes));
  }
  const auto data_of = [](const at::Tensor& tensor) -> void* {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const int error =
      kernels->decode(device.index(), decoding, 0, recipe.rows, job.stored.const_data_ptr(), to,
                      static_cast<float*>(data_of(panel)), panel_rows, data_of(more_terms),
                      static_cast<uint8_t*>(data_of(job.finite.value_or(at::Tensor()))),
                      static_cast<CUstream_st*>(stream.native_handle()));
  check_cuda(*kernels, error, "decoding a weight");
}

}  // namespace distorch
