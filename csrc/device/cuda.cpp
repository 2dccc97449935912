#include "device/cuda.h"

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
  return kernels != nullptr && kernels->version == cuda::kLibraryVersion ? kernels : nullptr;
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

}  // namespace distorch
