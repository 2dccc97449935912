// SPDX-License-Identifier: Apache-2.0
// Where the kernels for CUDA devices come from.
#pragma once

#include <string>

#include "cuda/library.h"
#include "device/decode.h"

namespace distorch {

// The file that has them; takes effect before they are first asked for.
void set_cuda_library(std::string path);

// Null where there is no such file, it is of another build, or of a newer CUDA
// than the machine's driver.
const cuda::Kernels* cuda_kernels();

// Throws c10::Error for an error that a function of `kernels` gave back.
void check_cuda(const cuda::Kernels& kernels, int error, const char* what);

// The kernel of decode() for CUDA devices, by what cuda::Kernels::decode says. Throws c10::Error,
// also where there are no kernels.
void decode_on_cuda(const DecodeJob& job);

}  // namespace distorch
