// Where the kernels for CUDA devices come from.
#pragma once

#include <string>

#include "cuda/library.h"

namespace distorch {

// The file that has them; takes effect before they are first asked for.
void set_cuda_library(std::string path);

// Null where there is no such file, or it is of another build.
const cuda::Kernels* cuda_kernels();

// Throws c10::Error for an error that a function of `kernels` gave back.
void check_cuda(const cuda::Kernels& kernels, int error, const char* what);

}  // namespace distorch
