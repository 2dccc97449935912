// SPDX-License-Identifier: Apache-2.0
#include "cuda/numbers.cuh"

#include <cuda_runtime.h>

#include "cuda/numbers_run.h"
#include "cuda/round.cuh"

namespace distorch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMostRows = 65535;  // of a grid

// --- kernels ---

// A block takes kRun * kThreads columns of a row; its threads' columns follow
// each other, so that a warp reads and writes neighbours.
template <class Type, class Out>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const uint8_t* from, int64_t begin, int64_t rows, int64_t columns,
                 const ScaleGrid scales, Out* into) {
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const uint8_t* stored = from + row * columns * Type::kBytes;
    const float* grid = scales.data;
    if (grid != nullptr) grid += block_of(begin + row, scales.block_rows) * scales.per_row;
    const ScaleGrid of_row{grid, 1, scales.block_columns, 0};
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRun * kThreads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int64_t column = first + i * kThreads;
      if (column >= columns) break;
      round_to(scaled<Type>(stored, 0, column, columns, of_row), into + row * columns + column);
    }
  }
}

// --- launchers ---

struct Work {
  const uint8_t* from;
  int64_t begin, rows, columns;
  ScaleGrid scales;
  void* into;
  cudaStream_t stream;
};

template <class Type, class Out>
void launch(const Work& work) {
  const int64_t wide = (work.columns + kRun * kThreads - 1) / (kRun * kThreads);
  const dim3 grid(static_cast<unsigned>(wide),
                  static_cast<unsigned>(work.rows < kMostRows ? work.rows : kMostRows));
  scale_kernel<Type, Out><<<grid, kThreads, 0, work.stream>>>(
      work.from, work.begin, work.rows, work.columns, work.scales, static_cast<Out*>(work.into));
}

template <class Type>
void launch(const Work& work, Element out_type) {
  switch (out_type) {
    case Element::kFloat32:
      return launch<Type, float>(work);
    case Element::kFloat16:
      return launch<Type, __half>(work);
    case Element::kBFloat16:
      return launch<Type, __nv_bfloat16>(work);
  }
}

}  // namespace

int scale(std::string_view code, const void* from, int64_t begin, int64_t rows, int64_t columns,
          const Scales& scales, Element out_type, void* into, CUstream_st* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const ScaleGrid grid{scales.data, scales.block_rows, scales.block_columns, scales.per_row};
  const Work work{static_cast<const uint8_t*>(from), begin, rows, columns, grid, into, stream};
  if (code == "float32") {
    launch<PlainFloat32>(work, out_type);
  } else if (code == "float16") {
    launch<PlainFloat16>(work, out_type);
  } else if (code == "bfloat16") {
    launch<PlainBFloat16>(work, out_type);
  } else if (code == "float8_e4m3fn") {
    launch<Float8E4M3FN>(work, out_type);
  } else if (code == "float8_e5m2") {
    launch<Float8E5M2>(work, out_type);
  } else if (code == "int8") {
    launch<Int8>(work, out_type);
  } else if (code == "uint8") {
    launch<UInt8>(work, out_type);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace distorch::cuda
