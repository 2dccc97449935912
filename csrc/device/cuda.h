// Where the kernels for CUDA devices come from.
#pragma once

#include <c10/core/Device.h>

#include <string>

#include "cuda/library.h"

namespace distorch {

// The file that has them; takes effect before they are first asked for.
void set_cuda_library(std::string path);

// Null where there is no such file, it is of another build, or of a newer CUDA
// than the machine's driver.
const cuda::Kernels* cuda_kernels();

// Throws c10::Error for an error that a function of `kernels` gave back.
void check_cuda(const cuda::Kernels& kernels, int error, const char* what);

// Room on the device for `panel_rows` rows of float32, for cuda::more_terms_bytes(), and for a
// flag; all may be null.
struct DecodeScratch {
  float* panel = nullptr;
  int64_t panel_rows = 0;
  void* more_terms = nullptr;
  uint8_t* finite = nullptr;
};

// What cuda::Kernels::decode says, for rows [0, rows), on the device's current
// stream. Throws c10::Error, also where there are no kernels.
void decode_on_gpu(c10::Device device, const Decoding& decoding, int64_t rows, const void* stored,
                   void* into, const DecodeScratch& scratch);

}  // namespace distorch
